//! Where the empty file systems that writable layers begin with are kept. What is in them is [`crate::writable`]'s business.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::files::{self, StoreLock, at};
use super::{Error, Store};
use crate::writable::{TEMPLATES_MAX, WritableError};

impl Store {
    /// A template that is there.
    pub(crate) fn open_template(&self, name: &str) -> Result<Option<File>, Error> {
        let path = self.directories.templates.join(name);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// Have `make` fill an empty file, and keep it under this name, unless somebody else does so at this moment.
    pub(crate) fn publish_template(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<(), WritableError>,
    ) -> Result<File, WritableError> {
        let _lock = StoreLock::shared(&self.directories)?;
        let directory = &self.directories.templates;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(at(directory))?;
        let _one_at_a_time = self.directories.lock_layer("templates")?;
        if let Some(file) = self.open_template(name)? {
            return Ok(file);
        }
        self.remove_old_templates()?;
        let file = self.directories.temporary_file()?;
        make(file.path())?;
        let template = File::open(file.path()).map_err(at(file.path()))?;
        self.directories.publish(file, &directory.join(name), 0o600)?;
        Ok(template)
    }

    /// Make room for one more: those made first go first.
    fn remove_old_templates(&self) -> Result<(), Error> {
        let directory = &self.directories.templates;
        let mut known = Vec::new();
        for entry in fs::read_dir(directory).map_err(at(directory))? {
            let path = entry.map_err(at(directory))?.path();
            let made = fs::metadata(&path).and_then(|status| status.modified());
            known.push((made.ok(), path));
        }
        known.sort();
        let excess = (known.len() + 1).saturating_sub(TEMPLATES_MAX);
        known
            .into_iter()
            .take(excess)
            .try_for_each(|(_, path)| files::remove(&path))
    }
}
