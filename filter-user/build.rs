//! Takes the compiled XDP object in, if there is one.
//!
//! `cargo xtask` compiles it first and passes its path in `PULLGATE_XDP_OBJECT`. A plain
//! `cargo build` or `cargo test` needs no BPF toolchain: the binary then carries no program, and
//! says so when it is asked to filter.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-env-changed=PULLGATE_XDP_OBJECT");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let embedded = Path::new(&out).join("filter.o");
    match env::var("PULLGATE_XDP_OBJECT") {
        Ok(object) => {
            println!("cargo:rerun-if-changed={object}");
            fs::copy(object, embedded)?;
        }
        Err(_) => fs::write(embedded, [])?,
    }
    Ok(())
}
