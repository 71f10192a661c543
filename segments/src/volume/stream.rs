//! An encrypted volume: an age v1 file whose content is the volume, in chunks of 64 KiB, so that
//! `age --decrypt` opens it and a reader holds one chunk at a time.
//!
//! A chunk is given out only after its tag was verified, and a cut is told from an end: the last chunk
//! says that it is the last.

use std::io::{self, Read, Write};

use zeroize::Zeroizing;

use super::VolumeError;
use crate::age::{
    AgeIdentity, AgeRecipients, CHUNK_BYTES, NONCE_BYTES, PayloadKey, TAG_BYTES, VERSION_LINE,
    chunk_nonce, open, seal,
};
use crate::crypt::CryptError;
use crate::limits::MAX_VOLUME_AGE_HEADER_BYTES;

/// The first bytes of an encrypted volume.
pub const ENCRYPTED_MAGIC: &[u8] = VERSION_LINE.as_bytes();

fn refused() -> io::Error {
    io::Error::other("the cipher refused a chunk")
}

/// Encrypts what is written, for age recipients.
pub struct AgeWriter<W> {
    write: W,
    key: PayloadKey,
    chunk: u64,
    plain: Zeroizing<Vec<u8>>,
}

impl<W: Write> AgeWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// [`VolumeError::Io`], or [`VolumeError::Crypt`] if the library refuses a recipient.
    pub fn new(mut write: W, to: &AgeRecipients) -> Result<Self, VolumeError> {
        let (header, key) = to
            .begin()
            .ok_or_else(|| CryptError::Wrap("age: the library refused a recipient".to_owned()))?;
        write.write_all(&header)?;
        Ok(Self {
            write,
            key,
            chunk: 0,
            plain: Zeroizing::new(Vec::with_capacity(CHUNK_BYTES)),
        })
    }

    fn end_chunk(&mut self, last: bool) -> io::Result<()> {
        let sealed = seal(&self.key, chunk_nonce(self.chunk, last), &self.plain);
        self.write.write_all(&sealed.ok_or_else(refused)?)?;
        self.chunk = self.chunk.checked_add(1).ok_or_else(refused)?;
        self.plain.clear();
        Ok(())
    }

    /// Writes the last chunk; what was written before cannot be read as whole without it.
    ///
    /// # Errors
    /// [`io::Error`] of the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.end_chunk(true)?;
        Ok(self.write)
    }
}

impl<W: Write> Write for AgeWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.plain.len() == CHUNK_BYTES {
            self.end_chunk(false)?;
        }
        let taken = bytes.len().min(CHUNK_BYTES - self.plain.len());
        self.plain
            .extend_from_slice(bytes.get(..taken).unwrap_or_default());
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write.flush()
    }
}

/// Decrypts an age file that is to one of the identities.
pub struct AgeReader<R> {
    read: R,
    key: PayloadKey,
    chunk: u64,
    plain: Zeroizing<Vec<u8>>,
    given: usize,
    ended: bool,
}

impl<R: Read> AgeReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`VolumeError::Crypt`] with [`CryptError::NoKey`] if none of the identities opens it or it was
    /// changed, [`VolumeError::Magic`] or [`VolumeError::Torn`] if it is no age file or cut off.
    pub fn new(mut read: R, identity: &AgeIdentity) -> Result<Self, VolumeError> {
        let mut header = Vec::new();
        let mut line_from = 0;
        loop {
            let mut byte = [0];
            if read.read(&mut byte)? == 0 {
                return Err(VolumeError::Torn { offset: 0 });
            }
            header.extend_from_slice(&byte);
            let [byte] = byte;
            if header.len() > MAX_VOLUME_AGE_HEADER_BYTES
                || !(header.starts_with(ENCRYPTED_MAGIC) || ENCRYPTED_MAGIC.starts_with(&header))
            {
                return Err(VolumeError::Magic);
            }
            if byte == b'\n' {
                let line = header.get(line_from..).unwrap_or_default();
                if line.starts_with(b"--- ") {
                    break;
                }
                line_from = header.len();
            }
        }
        let mut nonce = [0; NONCE_BYTES];
        read.read_exact(&mut nonce)
            .map_err(|_| VolumeError::Torn { offset: 0 })?;
        header.extend_from_slice(&nonce);
        let (key, _) = identity.begin(&header).ok_or(CryptError::NoKey)?;
        Ok(Self {
            read,
            key,
            chunk: 0,
            plain: Zeroizing::new(Vec::new()),
            given: 0,
            ended: false,
        })
    }

    fn next_chunk(&mut self) -> io::Result<()> {
        let mut sealed = Vec::with_capacity(CHUNK_BYTES + TAG_BYTES);
        let most = (CHUNK_BYTES + TAG_BYTES) as u64;
        self.read.by_ref().take(most).read_to_end(&mut sealed)?;
        if sealed.is_empty() {
            // The last chunk, which says so, has not come.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let whole = sealed.len() == CHUNK_BYTES + TAG_BYTES;
        let middle = whole
            .then(|| open(&self.key, chunk_nonce(self.chunk, false), &sealed))
            .flatten();
        self.plain = match middle {
            Some(plain) => plain,
            None => {
                let last = open(&self.key, chunk_nonce(self.chunk, true), &sealed);
                self.ended = true;
                last.ok_or_else(|| {
                    let kind = match whole {
                        true => io::ErrorKind::InvalidData,
                        // Cut off here, or changed: nobody can tell.
                        false => io::ErrorKind::UnexpectedEof,
                    };
                    io::Error::from(kind)
                })?
            }
        };
        // Nothing follows the last chunk, and only an empty file has an empty one.
        let empty = self.plain.is_empty() && self.chunk > 0;
        if self.ended && (empty || self.read.read(&mut [0])? != 0) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.chunk = self.chunk.checked_add(1).ok_or_else(refused)?;
        self.given = 0;
        Ok(())
    }
}

impl<R: Read> Read for AgeReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.given >= self.plain.len() {
            if self.ended || out.is_empty() {
                return Ok(0);
            }
            self.next_chunk()?;
        }
        let rest = self.plain.get(self.given..).unwrap_or_default();
        let count = rest.len().min(out.len());
        for (slot, byte) in out.iter_mut().zip(rest) {
            *slot = *byte;
        }
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the age specification says: an empty last chunk stands only in an empty file.
    #[test]
    fn an_empty_chunk_at_the_end_of_a_file_that_holds_something_is_refused() {
        let to =
            AgeRecipients::new(&["age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"])
                .unwrap();
        let identity = AgeIdentity::parse(
            "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX",
        )
        .unwrap();
        for (early, sound) in [(false, true), (true, false)] {
            let mut writer = AgeWriter::new(Vec::new(), &to).unwrap();
            writer.write_all(&[7; CHUNK_BYTES]).unwrap();
            if early {
                writer.end_chunk(false).unwrap();
            }
            let bytes = writer.finish().unwrap();
            let mut plain = Vec::new();
            let mut reader = AgeReader::new(bytes.as_slice(), &identity).unwrap();
            assert_eq!(reader.read_to_end(&mut plain).is_ok(), sound);
            assert_eq!(plain, [7; CHUNK_BYTES]);
        }
    }
}
