//! The structure of the packages. A file imports only from lower floors of its package's map, unsafe code is in one package
//! only, and each unsafe block names the check that makes it sound.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The source folders whose `lib.rs` has a map.
const MAPPED: [&str; 3] = ["src", "kernels/src", "heatmap/src"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// All Rust files in a folder and its subfolders, with their text.
fn rust_files(folder: &Path) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let rust = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let with_text = rust.map(|path| (path.clone(), fs::read_to_string(path).unwrap()));
    with_text.chain(folders.iter().flat_map(|folder| rust_files(folder))).collect()
}

/// The floor of each module on the map in `lib.rs`. A module is a path in the folder without the suffix, such as `layer/core`.
fn floors(src: &Path) -> BTreeMap<String, u32> {
    let mut floors = BTreeMap::new();
    let text = fs::read_to_string(src.join("lib.rs")).unwrap();
    for line in text.lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let cells = line.split('|').map(str::trim).collect::<Vec<_>>();
        if let Ok(floor) = cells[0].parse() {
            floors.extend(cells[1].split(", ").map(|module| (module.trim_matches('`').to_string(), floor)));
        }
    }
    floors
}

/// The module on the map that `path` is in, and its floor. `layer/kv_cache/store` is in `layer/kv_cache`.
fn module_of<'a>(floors: &'a BTreeMap<String, u32>, path: &[&str]) -> Option<(&'a String, &'a u32)> {
    (1..=path.len()).rev().find_map(|len| floors.get_key_value(&path[..len].join("/")))
}

/// The paths behind `crate::` in the code of a file, without comments and without its tests.
fn imports(text: &str) -> Vec<Vec<&str>> {
    let code = text.split("\n#[cfg(test)]").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let end_of_path = |c: char| !(c.is_alphanumeric() || c == '_' || c == ':');
    lines
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| rest.split(end_of_path).next().unwrap_or_default().split("::").collect())
        .collect()
}

#[test]
fn every_module_is_on_the_map_and_imports_only_from_below() {
    for name in MAPPED {
        let src = folder(name);
        let floors = floors(&src);
        let mut found = 0;
        for (file, text) in rust_files(&src) {
            let path = file.strip_prefix(&src).unwrap().with_extension("");
            let path: Vec<&str> = path.iter().map(|part| part.to_str().unwrap()).collect();
            let path = path.strip_suffix(&["mod"]).unwrap_or(&path);
            if path == ["lib"] || path.last().is_some_and(|file| file.ends_with("_tests")) {
                continue;
            }
            let (module, floor) =
                module_of(&floors, path).unwrap_or_else(|| panic!("{name}: {path:?} isn't on the map in lib.rs"));
            for import in imports(&text) {
                // A path that is no module is an item that lib.rs exports.
                let Some((other, below)) = module_of(&floors, &import) else { continue };
                let is_below = other == module || below < floor;
                assert!(is_below, "{}: `{other}` (floor {below}) isn't below floor {floor}", file.display());
                found += 1;
            }
        }
        for module in floors.keys() {
            let is_there = src.join(module).with_extension("rs").is_file() || src.join(module).is_dir();
            assert!(is_there, "{name}: `{module}` of the map isn't there");
        }
        assert!(found > 5, "{name}: only {found} imports found");
    }
}

#[test]
fn unsafe_code_is_in_the_kernels_only() {
    for name in ["src", "heatmap/src", "files/src"] {
        let src = folder(name);
        for (file, text) in rust_files(&src) {
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let found = code.filter(|line| !line.contains("forbid(unsafe_code)")).find(|line| line.contains("unsafe"));
            assert_eq!(found, None, "{}", file.display());
        }
        assert!(fs::read_to_string(src.join("lib.rs")).unwrap().contains("#![forbid(unsafe_code)]"), "{name}");
    }
}

/// Clippy's `undocumented_unsafe_blocks` asks for a comment. The comment has to name a check, and not only a promise.
#[test]
fn every_unsafe_block_names_its_check() {
    let lib = fs::read_to_string(folder("kernels/src/lib.rs")).unwrap();
    assert!(lib.contains("clippy::undocumented_unsafe_blocks"));
    let mut comments = 0;
    for (file, text) in rust_files(&folder("kernels/src")) {
        for line in text.lines().filter(|line| line.contains("SAFETY:")) {
            assert!(!line.contains("the caller promises"), "{}: {line}", file.display());
            comments += 1;
        }
    }
    assert!(comments > 10, "only {comments} found");
}
