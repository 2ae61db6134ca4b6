//! The house stands on its floors: a file imports only from floors below its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module -> floor, read from the map on the crate's front page.
fn floors() -> BTreeMap<String, u32> {
    let mut floors = BTreeMap::new();
    for line in include_str!("../src/lib.rs").lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let cells = line.split('|').map(str::trim).collect::<Vec<_>>();
        if let Ok(floor) = cells[0].parse() {
            floors.extend(cells[1].split(", ").map(|module| (module.trim_matches('`').to_string(), floor)));
        }
    }
    floors
}

/// The Rust files of a module, or of a folder of it.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        let is_rust = path.extension().is_some_and(|extension| extension == "rs");
        return is_rust.then(|| path.to_path_buf()).into_iter().collect();
    }
    fs::read_dir(path).unwrap().flat_map(|entry| files(&entry.unwrap().path())).collect()
}

#[test]
fn every_module_is_on_the_map_and_imports_only_from_below() {
    let floors = floors();
    let mut imports = 0;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_string();
        if module == "lib" {
            continue;
        }
        let floor = floors.get(&module).unwrap_or_else(|| panic!("`{module}` isn't on the map in src/lib.rs"));
        for file in files(&path) {
            let source = fs::read_to_string(&file).unwrap();
            for line in source.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for path in line.split("crate::").skip(1) {
                    let imported = path.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap();
                    if imported != module {
                        let below = floors.get(imported).is_some_and(|other| other < floor);
                        assert!(below, "{}: `{imported}` isn't below floor {floor}", file.display());
                        imports += 1;
                    }
                }
            }
        }
    }
    assert!(imports > 20, "only {imports} imports found");
}
