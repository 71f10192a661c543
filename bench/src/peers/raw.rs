//! The physical floor: one write and one `fdatasync` into a file that is allocated and zero-filled.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Log, text};

const FILE_BYTES: u64 = 64 << 20;

pub struct Raw {
    file: File,
    next: AtomicU64,
}

impl Raw {
    pub fn open(dir: &Path) -> Result<Self, String> {
        std::fs::create_dir_all(dir).map_err(text)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(dir.join("raw"))
            .map_err(text)?;
        let zeros = vec![0; 1 << 20];
        for at in (0..FILE_BYTES).step_by(zeros.len()) {
            file.write_all_at(&zeros, at).map_err(text)?;
        }
        file.sync_all().map_err(text)?;
        Ok(Self {
            file,
            next: AtomicU64::new(0),
        })
    }
}

impl Log for Raw {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        let at =
            self.next.fetch_add(record.len() as u64, Ordering::Relaxed) % (FILE_BYTES - (1 << 20));
        self.file.write_all_at(record, at).map_err(text)?;
        self.file.sync_data().map_err(text)
    }
}
