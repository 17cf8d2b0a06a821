//! Writes the frames of the verdict table, to begin from: `seeds <directory>`.

use std::path::Path;
use std::{env, fs, io};

use filter_ebpf::cases::{Table, cases};

fn main() -> io::Result<()> {
    let directory = env::args_os().nth(1).ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(&directory)?;
    for (number, case) in cases(Table::Default).iter().enumerate() {
        fs::write(Path::new(&directory).join(format!("case-{number}")), &case.frame)?;
    }
    Ok(())
}
