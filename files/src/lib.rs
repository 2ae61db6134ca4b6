//! Files that are read as a whole, and written as a whole or not at all.
//!
//! [`write()`] makes a new file in the same folder, syncs it to disk, and renames it to the old one's name. Whoever reads the
//! file meanwhile sees the old file or the new one, and a full disk or a kill leaves the old one.
//!
//! ```
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("numbers.txt");
//! attention_files::write(&path, b"1 2 3")?;
//! assert_eq!(attention_files::read(&path)?, b"1 2 3");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(missing_docs)]
#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file that can't be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: can't {action}: {cause}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What was tried: "read" or "write".
    pub action: &'static str,
    /// What the system says.
    pub cause: String,
}

impl FileError {
    /// An error of the system when it read the file.
    pub fn read(path: &Path, cause: &std::io::Error) -> Self {
        Self { path: path.to_path_buf(), action: "read", cause: cause.to_string() }
    }
}

/// Reads the whole file.
///
/// # Errors
///
/// A file that isn't there or can't be read.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(|cause| FileError::read(path, &cause))
}

/// Writes the whole file or nothing. A symbolic link stays a link, and the file that it points to is replaced. A replaced
/// file's permissions stay.
///
/// # Errors
///
/// A folder in the file's place, a folder that can't be written to, a full disk. An earlier file is then as it was.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    follow_links(path).and_then(|target| replace_file(&target, bytes)).map_err(|cause| FileError {
        path: path.to_path_buf(),
        action: "write",
        cause: cause.to_string(),
    })
}

/// The file that a symbolic link points to, even if that file isn't there yet. Linux follows at most 40 links.
fn follow_links(path: &Path) -> std::io::Result<PathBuf> {
    let mut target = path.to_path_buf();
    for _ in 0..40 {
        match fs::read_link(&target) {
            Ok(next) => target = target.parent().unwrap_or(Path::new("")).join(next),
            Err(_) => return Ok(target),
        }
    }
    Err(std::io::Error::other("more than 40 symbolic links, one to the next"))
}

fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if path.is_dir() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    // The permissions of a file made in the ordinary way: the umask takes away what it takes away.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.prefix(".candle-attention-").tempfile_in(folder)?;
    if let Ok(old) = fs::metadata(path) {
        file.as_file().set_permissions(old.permissions())?;
    }
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // A rename is on disk only after the folder has been synced. Only Unix can sync a folder.
    #[cfg(unix)]
    fs::File::open(folder)?.sync_all()?;
    Ok(())
}
