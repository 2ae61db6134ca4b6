//! A file is written as a whole or not at all. The tests of checkpoints in the root package cover more, through a
//! layer.

use std::fs;
use std::path::Path;

use attention_files::{FileError, read, write};

/// The names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    names.sort();
    names
}

/// Checks every field of the error, and its text.
#[track_caller]
fn assert_fails<T: std::fmt::Debug>(result: Result<T, FileError>, path: &Path, action: &str) {
    let error = result.unwrap_err();
    assert_eq!((error.path.as_path(), error.action), (path, action));
    assert!(!error.cause.is_empty());
    assert_eq!(error.to_string(), format!("{}: can't {action}: {}", path.display(), error.cause));
}

#[test]
fn a_file_reads_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers");
    for bytes in [&b"first"[..], b"", &[0, 255].repeat(1 << 16)] {
        write(&path, bytes).unwrap();
        assert_eq!(read(&path).unwrap(), bytes);
        assert_eq!(names(folder.path()), ["numbers"]);
    }
}

#[test]
fn a_missing_folder_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing/numbers");
    assert_fails(write(&path, b"1"), &path, "write");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn a_folder_is_not_replaced_by_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers");
    fs::create_dir(&path).unwrap();
    assert_fails(write(&path, b"1"), &path, "write");
    assert!(path.is_dir() && names(&path).is_empty());
    assert_eq!(names(folder.path()), ["numbers"]);
}

#[test]
fn a_file_is_no_folder_to_write_into() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "kept").unwrap();
    let path = file.join("numbers");
    assert_fails(write(&path, b"1"), &path, "write");
    assert_eq!(read(&file).unwrap(), b"kept");
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn a_path_without_a_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for path in [Path::new(""), Path::new("/"), &folder.path().join("..")] {
        assert!(write(path, b"1").is_err(), "{}", path.display());
    }
}

#[test]
fn a_file_that_is_not_there_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers");
    assert_fails(read(&path), &path, "read");
    assert_fails(read(folder.path()), folder.path(), "read");
}

#[test]
fn an_error_of_the_system_becomes_the_cause() {
    let cause = std::io::Error::other("no more paper");
    let error = FileError::read(Path::new("numbers"), &cause);
    assert_eq!(error, FileError { path: "numbers".into(), action: "read", cause: "no more paper".to_string() });
    assert_eq!(error.to_string(), "numbers: can't read: no more paper");
}

/// Whoever reads while another writes gets the old file or the new one.
#[test]
fn a_file_is_whole_at_any_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers");
    let versions = [vec![1; 1 << 16], vec![2; 1 << 17]];
    write(&path, &versions[0]).unwrap();
    std::thread::scope(|scope| {
        let writers = versions.each_ref().map(|bytes| scope.spawn(|| (0..30).try_for_each(|_| write(&path, bytes))));
        while writers.iter().any(|writer| !writer.is_finished()) {
            assert!(versions.contains(&read(&path).unwrap()), "a file in part");
        }
        for writer in writers {
            writer.join().unwrap().unwrap();
        }
    });
    assert_eq!(names(folder.path()), ["numbers"]);
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("step-100"), folder.path().join("latest"));
        symlink("step-100", &link).unwrap();
        // At first the link points to a file that isn't there yet.
        for bytes in [b"first", b"later"] {
            write(&link, bytes).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), Path::new("step-100"));
            assert!(fs::symlink_metadata(&target).unwrap().is_file());
            assert_eq!(read(&target).unwrap(), bytes);
        }
        assert_eq!(names(folder.path()), ["latest", "step-100"]);
    }

    #[test]
    fn a_link_that_leads_to_itself_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        for (link, target) in [("itself", "itself"), ("a", "b"), ("b", "a")] {
            symlink(target, folder.path().join(link)).unwrap();
        }
        for link in ["itself", "a"] {
            let link = folder.path().join(link);
            assert_fails(write(&link, b"1"), &link, "write");
        }
        assert!(write(&folder.path().join("a"), b"1").unwrap_err().cause.contains("40 symbolic links"));
        assert_eq!(names(folder.path()), ["a", "b", "itself"]);
    }

    #[test]
    fn the_permissions_of_a_replaced_file_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers");
        write(&path, b"1").unwrap();
        for wanted in [0o600, 0o640] {
            fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
            write(&path, b"2").unwrap();
            assert_eq!(mode(&path), wanted);
        }
    }

    /// A new file gets what the umask leaves of 0666, and not the 0600 of a temporary file.
    #[test]
    fn a_new_file_has_ordinary_permissions() {
        let folder = tempfile::tempdir().unwrap();
        let (ordinary, written) = (folder.path().join("ordinary"), folder.path().join("written"));
        fs::write(&ordinary, "").unwrap();
        write(&written, b"1").unwrap();
        assert_eq!(mode(&written), mode(&ordinary));
    }
}
