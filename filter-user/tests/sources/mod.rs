//! The sources of the crate, for tests that read them.

use std::fs;
use std::path::{Path, PathBuf};

/// Where they are.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// All source files below a directory.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let below = |path: PathBuf| {
        if path.is_dir() {
            files(&path)
        } else {
            vec![path]
        }
    };
    entries
        .flat_map(|entry| below(entry.unwrap().path()))
        .filter(|path| !path.ends_with("tests.rs"))
        .collect()
}
