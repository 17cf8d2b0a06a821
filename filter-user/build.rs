//! Takes the compiled objects in, if there are any: the XDP program's, and that of steering beside it.
//!
//! `cargo xtask` compiles them first and passes the path of the first in `PULLGATE_XDP_OBJECT`. A plain
//! `cargo build` or `cargo test` needs no BPF toolchain: the binary then carries no program, and
//! says so when it is asked to filter.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-env-changed=PULLGATE_XDP_OBJECT");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let named = env::var_os("PULLGATE_XDP_OBJECT");
    for name in ["filter", "steer"] {
        let embedded = Path::new(&out).join(name).with_extension("o");
        match &named {
            Some(object) => {
                let object = Path::new(object).with_file_name(name);
                println!("cargo:rerun-if-changed={}", object.display());
                fs::copy(object, embedded)?;
            }
            None => fs::write(embedded, [])?,
        }
    }
    Ok(())
}
