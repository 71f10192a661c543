//! The open active file, and the buffer that goes to it.

use crate::disk::{DIRECT_BUFFER_ALIGN_BYTES, DiskError, DiskFile, OpenMode};
use crate::limits::{LOG_HEADER_BYTES, MAX_BATCH_BYTES};
use crate::root::{Root, RootError};

/// A file that may be written. A failed write or sync consumes it: what is on the device is then
/// unknown, a second sync would prove nothing, and there is no value left to call it on.
#[derive(Debug)]
pub(super) struct LiveFile {
    file: Box<dyn DiskFile>,
}

impl LiveFile {
    /// Opens a file for commits, past the page cache where that can be had.
    pub(super) fn open(root: &Root, path: &str) -> Result<Self, RootError> {
        Ok(Self {
            file: root.open_file(path, OpenMode::Direct)?,
        })
    }

    /// Writes and syncs.
    pub(super) fn commit(self, offset: u64, bytes: &[u8]) -> Result<Self, DiskError> {
        self.file.write_at(offset, bytes)?;
        self.file.sync_data()?;
        Ok(self)
    }

    /// Whether nothing leads to the file any more.
    pub(super) fn is_gone(&self) -> bool {
        self.file.stat().map_or(true, |stat| stat.nlink == 0)
    }
}

/// A buffer whose content begins at an address that direct writes accept. It never grows.
#[derive(Debug)]
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    /// Room for one header block and one batch.
    pub(super) fn new() -> Self {
        Self::with_room(usize::try_from(LOG_HEADER_BYTES).unwrap_or(4096) + MAX_BATCH_BYTES)
    }

    pub(super) fn with_room(room: usize) -> Self {
        let mut bytes: Vec<u8> = Vec::with_capacity(room + DIRECT_BUFFER_ALIGN_BYTES);
        let start = bytes.as_ptr().align_offset(DIRECT_BUFFER_ALIGN_BYTES);
        // `align_offset` may decline to answer; then direct writes fail and are reported.
        let start = if start < DIRECT_BUFFER_ALIGN_BYTES {
            start
        } else {
            0
        };
        bytes.resize(start, 0);
        Self { bytes, start }
    }

    pub(super) fn clear(&mut self) {
        self.bytes.truncate(self.start);
    }

    /// The bytes from the aligned address on.
    pub(super) fn content(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// The same, to be overwritten.
    pub(super) fn content_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..).unwrap_or_default()
    }

    /// The vector, whose content begins at the index given.
    pub(super) fn parts(&mut self) -> (&mut Vec<u8>, usize) {
        (&mut self.bytes, self.start)
    }
}

/// Reads the front of a file from the device, past the page cache where that can be had.
pub(super) fn read_device(root: &Root, path: &str, len: usize) -> Result<Vec<u8>, RootError> {
    let file = root.open_file(path, OpenMode::Direct)?;
    let len = len.next_multiple_of(usize::try_from(file.align_bytes()).unwrap_or(1));
    let mut buffer = AlignedBuffer::with_room(len);
    let (bytes, start) = buffer.parts();
    bytes.resize(start + len, 0);
    file.read_at(0, buffer.content_mut())?;
    Ok(buffer.content().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_is_aligned_and_stays_so() {
        let mut buffer = AlignedBuffer::new();
        let address = buffer.content().as_ptr();
        assert_eq!(address.align_offset(DIRECT_BUFFER_ALIGN_BYTES), 0);
        let (bytes, start) = buffer.parts();
        bytes.resize(start + MAX_BATCH_BYTES + 4096, 7);
        assert_eq!(buffer.content().as_ptr(), address);
        buffer.clear();
        assert!(buffer.content().is_empty());
    }
}
