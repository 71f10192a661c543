//! A bundle taken apart, for whoever compares two of them. Nothing of it is verified, so nothing of it decides in a
//! node: that takes a [`VerifiedBundle`](crate::VerifiedBundle).

use cedar_policy::PolicySet;
use serde_json::Value;

use crate::archive::{self, ENTITIES, Files};
use crate::cedar::{self, CedarEngine};
use crate::error::BundleError;
use crate::json;
use crate::manifest::Manifest;

/// The files of an archive, and its manifest.
#[derive(Debug, Clone)]
pub struct Contents {
    files: Files,
    manifest: Manifest,
}

impl Contents {
    /// Takes an archive apart.
    ///
    /// # Errors
    /// [`BundleError`] where it is none, or its manifest is none.
    pub fn read(archive: &[u8]) -> Result<Self, BundleError> {
        let files = archive::read(archive)?;
        let manifest = Manifest::of(&files)?;
        Ok(Self { files, manifest })
    }

    /// The checked manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Every file by its path, in the order of the archive.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let files = self.files.iter();
        files.map(|(path, bytes)| (path.as_str(), bytes.as_slice()))
    }

    /// One file.
    #[must_use]
    pub fn file(&self, path: &str) -> Option<&[u8]> {
        self.files.get(path).map(Vec::as_slice)
    }

    /// The entities as they are listed, none where there is no list.
    ///
    /// # Errors
    /// [`BundleError`] where the list is no strict JSON.
    pub fn entities(&self) -> Result<Vec<Value>, BundleError> {
        let Some(bytes) = self.file(ENTITIES) else {
            return Ok(Vec::new());
        };
        match json::parse(bytes) {
            Ok(Value::Array(listed)) => Ok(listed),
            Ok(_) => Err(BundleError::format(format!("{ENTITIES}: no list"))),
            Err(error) => Err(BundleError::format(format!("{ENTITIES}: {error}"))),
        }
    }

    /// The Cedar policies that decide, those made from templates written out. Parses, which takes stack.
    ///
    /// # Errors
    /// [`BundleError`] where one does not compile.
    pub fn cedar_policies(&self) -> Result<PolicySet, BundleError> {
        cedar::static_policies(&self.files)
    }

    /// The Cedar policies as they would decide. Compiles, which takes stack.
    ///
    /// # Errors
    /// [`BundleError`] where they do not compile or validate.
    pub fn cedar_engine(&self) -> Result<CedarEngine, BundleError> {
        CedarEngine::compile(&self.files)
    }

    /// The same engine with these entities in the place of the bundle's own.
    ///
    /// # Errors
    /// As [`cedar_engine`](Self::cedar_engine), and where the entities do not fit the schema.
    pub fn cedar_engine_supposing(&self, entities: &Value) -> Result<CedarEngine, BundleError> {
        let mut files = self.files.clone();
        files.insert(ENTITIES.to_owned(), entities.to_string().into_bytes());
        CedarEngine::compile(&files)
    }
}
