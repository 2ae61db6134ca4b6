//! Files read as a whole, and written as a whole or not at all.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::AttentionError;

/// The whole file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, AttentionError> {
    fs::read(path).map_err(|cause| file_error(path, "read", &cause))
}

/// Writes the whole file or nothing: a new file in the same folder, synced to disk, takes the place of the old one.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), AttentionError> {
    // A link stays a link: what it points to is replaced.
    follow_links(path)
        .and_then(|target| replace_file(&target, bytes))
        .map_err(|cause| file_error(path, "write", &cause))
}

/// What a link leads to, even if that isn't there yet. Linux follows 40 links, and no more.
fn follow_links(path: &Path) -> std::io::Result<PathBuf> {
    let mut target = path.to_path_buf();
    for _ in 0..40 {
        match fs::read_link(&target) {
            Ok(next) => target = target.parent().unwrap_or(Path::new("")).join(next),
            Err(_) => return Ok(target),
        }
    }
    Err(std::io::Error::other("too many links, one to the next"))
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
    // Readable by others, as a file made in the ordinary way, less what the umask takes away; an old file's permissions
    // stay.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.prefix(".candle-attention-").tempfile_in(folder)?;
    if let Ok(old) = fs::metadata(path) {
        file.as_file().set_permissions(old.permissions())?;
    }
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The renaming itself is on disk once the folder is; only Unix can sync one.
    #[cfg(unix)]
    fs::File::open(folder)?.sync_all()?;
    Ok(())
}

pub(crate) fn file_error(path: &Path, action: &'static str, cause: &std::io::Error) -> AttentionError {
    AttentionError::File { path: path.to_path_buf(), action, cause: cause.to_string() }
}
