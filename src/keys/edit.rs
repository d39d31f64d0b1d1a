//! Changes to the keys file, which replace the file in one step.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::document::{EditError, KeysDocument, NewKey, Rotation};
use super::file::KeysFileError;
use super::key::KeyName;
use super::secret::Secret;

/// Adds a key with a new secret, which is returned.
pub(super) fn add_key(path: &Path, new: &NewKey) -> Result<Secret, EditError> {
    let secret = Secret::generate()?;
    edit(path, |document| document.add(new, &secret.hash()))?;
    Ok(secret)
}

/// Removes a key with all its secrets.
pub(super) fn revoke_key(path: &Path, name: &KeyName) -> Result<(), EditError> {
    edit(path, |document| document.remove(name))
}

/// Adds a new secret to a key, and returns the secret. The present secrets expire as `rotation` says.
pub(super) fn rotate_key(
    path: &Path,
    name: &KeyName,
    rotation: &Rotation,
) -> Result<Secret, EditError> {
    let secret = Secret::generate()?;
    edit(path, |document| {
        document.rotate(name, rotation, &secret.hash())
    })?;
    Ok(secret)
}

/// Changes the file at `path`, which may not exist yet.
fn edit(
    path: &Path,
    change: impl FnOnce(&mut KeysDocument) -> Result<(), EditError>,
) -> Result<(), EditError> {
    let failed = |error: io::Error| KeysFileError::new(path, error);
    // If the path is a link, the file that it names is replaced, not the link.
    let target = match fs::canonicalize(path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(failed(error).into()),
    };
    let folder = folder_of(&target);
    // The lock on the folder keeps two commands from changing the file at the same time.
    let lock = File::open(&folder).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let text = match fs::read_to_string(&target) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed(error).into()),
    };
    let mut document = KeysDocument::parse(path, &text)?;
    change(&mut document)?;
    let text = document.into_text(path)?;
    replace(&target, &folder, &text).map_err(failed)?;
    Ok(())
}

fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
    folder.map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// Replaces the file's text in one step. A new file can be read by its owner only. Otherwise the owner and the
/// permissions stay, so that a server of another user can still read the file.
fn replace(target: &Path, folder: &Path, text: &str) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    match fs::metadata(target) {
        Ok(old) => {
            let new = file.as_file().metadata()?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                fchown(file.as_file(), Some(old.uid()), Some(old.gid()))?;
            }
            file.as_file().set_permissions(old.permissions())?;
        }
        Err(_) => file
            .as_file()
            .set_permissions(Permissions::from_mode(0o600))?,
    }
    file.as_file().sync_all()?;
    file.persist(target)?;
    File::open(folder)?.sync_all()
}
