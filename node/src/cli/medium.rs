//! The files of a removable medium. Whoever had it in hand may have put anything there: links, pipes,
//! devices, names that a terminal obeys, and volumes that claim what they do not hold.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Read},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use rustix::fs::OFlags;
use tidelock_segments::{
    AgeIdentity, CryptError, DomainId,
    offline::Progress,
    volume::{
        AgeReader, ENCRYPTED_MAGIC, MAX_VOLUME_LIST_BYTES, VolumeError, VolumeList, VolumeReader,
    },
};

use super::{Failure, Output, output::Bar};

/// How the files of a medium end.
pub(super) const VOLUME: &str = ".tvol";
pub(super) const ENCRYPTED: &str = ".tvol.age";
pub(super) const LIST: &str = ".ids";
pub(super) const UNFINISHED: &str = ".part";
pub(super) const UNFINISHED_LIST: &str = ".ids.part";
/// Most files of ours on one medium: 4 TiB of volumes of the usual size. Names and what is told of each
/// take some hundred bytes.
const FILES_MAX: usize = 16_384;
const BUFFER_BYTES: usize = 256 * 1024;

/// A volume file, decrypted where it must be.
pub(super) type Reader = VolumeReader<Box<dyn Read>>;

/// Opens a plain file. A link could lead anywhere on this node, and a pipe would be waited for for ever.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    let plain = |metadata: fs::Metadata| {
        let no_file = || io::Error::other("not a plain file");
        metadata.is_file().then_some(()).ok_or_else(no_file)
    };
    // Before it is opened, too: to open a device can be to act on it.
    plain(fs::symlink_metadata(path)?)?;
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or_default())
        .open(path)?;
    plain(file.metadata()?)?;
    Ok(file)
}

/// Opens a volume and reads its header.
pub(super) fn open(path: &Path, key: Option<&AgeIdentity>) -> Result<Reader, VolumeError> {
    let mut file = BufReader::with_capacity(BUFFER_BYTES, open_file(path)?);
    if !file.fill_buf()?.starts_with(ENCRYPTED_MAGIC) {
        return VolumeReader::open(Box::new(file));
    }
    let key = key.ok_or(VolumeError::Crypt(CryptError::NoKey))?;
    VolumeReader::open(Box::new(AgeReader::new(file, key)?))
}

/// A text of a medium's making, so that no terminal obeys it.
pub(super) fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric() {
            true => out.push(c),
            false => out.extend(c.escape_unicode()),
        }
    }
    out
}

/// The files of a medium that are ours, by their names, in order.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Failure::at(dir, &e))? {
        let name = entry.map_err(|e| Failure::at(dir, &e))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let ours = [VOLUME, ENCRYPTED, LIST, UNFINISHED]
            .iter()
            .any(|end| name.ends_with(end));
        if name.starts_with("tide-") && ours {
            // INV-07: whoever fills a medium does not fill this memory.
            if all.len() >= FILES_MAX {
                let why = format!("more than {FILES_MAX} volumes; move some elsewhere");
                return Err(Failure::at(dir, &why));
            }
            all.push(name.to_owned());
        }
    }
    all.sort();
    Ok(all)
}

/// The name of a volume's files, without their end.
pub(super) fn stem(export_id: &[u8; 16], number: u32) -> String {
    let (front, _) = export_id.split_at(8);
    let hex: String = front.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("tide-{hex}-{number:04}")
}

/// What a name that was made by [`stem`] says: the first half of the export id, and the number.
fn stem_of(name: &str) -> Option<(&str, u32, &str)> {
    let (hex, rest) = name.strip_prefix("tide-")?.split_at_checked(16)?;
    let rest = rest.strip_prefix('-')?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, end) = rest.split_at_checked(digits)?;
    let hexed = hex.bytes().all(|b| b"0123456789abcdef".contains(&b));
    (hexed && digits >= 4).then_some(())?;
    Some((hex, number.parse().ok()?, end))
}

/// What of an export a medium holds.
#[derive(Debug, Default, Clone, Copy)]
struct Begun {
    highest: u32,
    ended: bool,
}

/// What an exporter looks for on a medium.
pub(super) struct Sought<'a> {
    pub(super) domain: &'a DomainId,
    /// [`VolumeList::recipients`] of the recipients, if there are any.
    pub(super) recipients: Option<[u8; 32]>,
    /// The keys of what could be written. Nothing else is remembered: what the store holds bounds this, not
    /// what lies on the medium (INV-07).
    pub(super) keys: HashSet<[u8; 32]>,
    /// Whether an export id is one of this exporter's for this addressee and these recipients.
    pub(super) is_ours: &'a dyn Fn(&[u8; 16]) -> bool,
}

/// What a medium holds already.
#[derive(Debug, Default)]
pub(super) struct Medium {
    pub(super) held: HashSet<[u8; 32]>,
    pub(super) damaged: Vec<String>,
    begun: BTreeMap<[u8; 16], Begun>,
    /// The highest number in the name of any file, by the half of the export id that is in it.
    named: BTreeMap<String, u32>,
}

impl Medium {
    /// Reads the volumes, so that a medium that lost something is found before it travels. What an
    /// interrupted export left unfinished goes.
    pub(super) fn look(dir: &Path, sought: &Sought<'_>, output: Output) -> Result<Self, Failure> {
        let mut medium = Self::default();
        let names = names(dir)?;
        let mut bar = output.bar("reading the medium");
        let mut progress = Progress {
            files_total: names.len() as u64,
            ..Progress::default()
        };
        for name in names {
            progress.files += 1;
            bar.show(progress);
            let end = stem_of(&name).map(|(hex, number, end)| {
                let highest = medium.named.entry(hex.to_owned()).or_default();
                *highest = number.max(*highest);
                end
            });
            let path = dir.join(&name);
            let read = if name.ends_with(UNFINISHED) {
                // A name that only looks like one of ours is somebody else's.
                match end.is_some_and(|end| end == UNFINISHED || end == UNFINISHED_LIST) {
                    true => fs::remove_file(&path).map_err(|e| e.to_string()),
                    false => Ok(()),
                }
            } else if let Some(stem) = name.strip_suffix(LIST) {
                let volume = dir.join(format!("{stem}{ENCRYPTED}"));
                medium.list(&path, &volume, sought)
            } else if name.ends_with(VOLUME) {
                medium
                    .volume(&path, sought, &mut progress, &mut bar)
                    .map_err(|e| e.to_string())
            } else {
                Ok(())
            };
            if let Err(why) = read {
                medium.damaged.push(shown(&format!("{name}: {why}")));
            }
        }
        Ok(medium)
    }

    fn volume(
        &mut self,
        path: &Path,
        sought: &Sought<'_>,
        progress: &mut Progress,
        bar: &mut Bar,
    ) -> Result<(), VolumeError> {
        let mut volume = open(path, None)?;
        let header = volume.header().clone();
        if header.domain != *sought.domain {
            return Ok(());
        }
        let ours = sought.recipients.is_none() && (sought.is_ours)(&header.export_id);
        if ours {
            self.begin(header.export_id, header.number, false);
        }
        while let Some(entry) = volume.next_entry()? {
            progress.bytes += entry.bytes.len() as u64;
            bar.show(*progress);
            let key = entry.mark.key();
            if sought.keys.contains(&key) && entry.is_as_marked() {
                self.held.insert(key);
            }
        }
        if ours {
            self.begin(
                header.export_id,
                header.number,
                volume.is_last() == Some(true),
            );
        }
        Ok(())
    }

    /// An encrypted volume, of which only the list beside it can be read, and that nothing changed.
    fn list(&mut self, path: &Path, volume: &Path, sought: &Sought<'_>) -> Result<(), String> {
        let mut bytes = Vec::new();
        open_file(path)
            .and_then(|file| {
                file.take(MAX_VOLUME_LIST_BYTES as u64 + 1)
                    .read_to_end(&mut bytes)
            })
            .map_err(|e| e.to_string())?;
        let list = VolumeList::decode(&bytes).ok_or("damaged")?;
        if sought.recipients != Some(list.recipients) {
            return Ok(());
        }
        let ours = (sought.is_ours)(&list.export_id);
        let file = match open_file(volume) {
            // Taken away, and its list left.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(|e| e.to_string())?,
        };
        if ours {
            self.begin(list.export_id, list.number, false);
        }
        let mut hash = blake3::Hasher::new();
        let length = hash.update_reader(file).map_err(|e| e.to_string())?.count();
        if (length, hash.finalize()) != (list.file_bytes, list.file_hash.into()) {
            return Err("the volume beside it is damaged".to_owned());
        }
        if ours {
            self.begin(list.export_id, list.number, list.last);
        }
        let held = list.keys.into_iter();
        self.held
            .extend(held.filter(|key| sought.keys.contains(key)));
        Ok(())
    }

    /// Notes a volume of an export; `last` if it is whole and ends it.
    fn begin(&mut self, export_id: [u8; 16], number: u32, last: bool) {
        let begun = self.begun.entry(export_id).or_default();
        begun.highest = number.max(begun.highest);
        begun.ended |= last;
    }

    /// An export that was interrupted here: its id, and the highest number that is taken.
    pub(super) fn interrupted(&self) -> Option<([u8; 16], u32)> {
        let goes_on = |begun: &Begun| !begun.ended;
        let (id, begun) = self.begun.iter().find(|(_, begun)| goes_on(begun))?;
        // The name of a volume that cannot be read any more is taken as well.
        let hex: String = id
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let named = self.named.get(&hex).copied().unwrap_or_default();
        let highest = begun.highest.max(named);
        ((highest as usize) < FILES_MAX).then_some((*id, highest))
    }
}
