//! A page that is made, and the file that has it.

use std::fs;
use std::path::Path;

/// Compares a page with the file at this path of the repository, or writes it if `PULLGATE_PAGES=write`.
pub(super) fn compare(path: &str, made: &str) {
    let file = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path);
    if std::env::var_os("PULLGATE_PAGES").is_some_and(|it| it == "write") {
        fs::write(&file, made).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == made,
        "{path} is not what the sources say: run this test with PULLGATE_PAGES=write"
    );
}
