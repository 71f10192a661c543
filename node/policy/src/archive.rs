//! The archive: an uncompressed ustar file with exactly one form for given contents.
//!
//! Signatures are made over the bytes of the archive, so there must be no two archives that read
//! alike. The reader therefore builds the archive again from what it read and demands equal
//! bytes; links, directories, extension headers, padding tricks and disorder all fail that test,
//! most of them earlier and by name.

use std::collections::BTreeMap;
use std::io::Read;

use tar::{Archive, Builder, EntryType, Header};

use crate::error::BundleError;
use crate::limits::{ARCHIVE_BYTES_MAX, FILE_BYTES_MAX, FILES_MAX, NAME_BYTES_MAX, PATH_BYTES_MAX};

/// Path of the manifest in every bundle.
pub const MANIFEST: &str = "manifest.json";
/// Path of the Cedar schema in every bundle.
pub const SCHEMA: &str = "schema.cedarschema";
/// Path of the optional entities.
pub const ENTITIES: &str = "entities.json";
/// Path of the optional links: policies made from templates.
pub const LINKS: &str = "links.json";
/// Path of the input schema of a bundle with Rego policies.
pub const INPUT_SCHEMA: &str = "input-schema.json";
/// Path of the optional data document of Rego policies.
pub const DATA: &str = "data.json";
/// Where further data documents lie.
pub(crate) const DATA_DIR: &str = "data/";
/// Where policies lie.
pub(crate) const POLICIES_DIR: &str = "policies/";
/// How the name of a file with Cedar policies ends.
pub(crate) const CEDAR: &str = ".cedar";
/// How the name of a file with Rego rules ends.
pub(crate) const REGO: &str = ".rego";

/// Files of an archive by path, in the order of the archive.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Whether a path may stand in a bundle: the fixed files, `policies/*.cedar`, `policies/*.rego`,
/// `data/*.json` and `tests/*.json`. An allow list: `..`, absolute paths and separators cannot occur.
pub(crate) fn is_bundle_path(path: &str) -> bool {
    if path.len() > PATH_BYTES_MAX {
        return false;
    }
    if matches!(
        path,
        MANIFEST | SCHEMA | ENTITIES | LINKS | INPUT_SCHEMA | DATA
    ) {
        return true;
    }
    [
        (POLICIES_DIR, CEDAR),
        (POLICIES_DIR, REGO),
        (DATA_DIR, ".json"),
        ("tests/", ".json"),
    ]
    .into_iter()
    .filter_map(|(dir, end)| path.strip_prefix(dir)?.strip_suffix(end))
    .any(is_name)
}

/// Whether a text is a name: 1 to 63 of `[A-Za-z0-9._-]`, the first a letter or digit.
pub(crate) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= NAME_BYTES_MAX
        && bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// Writes files as the one archive they have.
pub(crate) fn write(files: &Files) -> Result<Vec<u8>, BundleError> {
    let failed = |error: std::io::Error| BundleError::format(format!("archive: {error}"));
    if files.len() > FILES_MAX {
        return Err(BundleError::format(format!(
            "{} files, a bundle holds at most {FILES_MAX}",
            files.len()
        )));
    }
    let mut builder = Builder::new(Vec::new());
    for (path, bytes) in files {
        if !is_bundle_path(path) {
            return Err(unknown_path(path));
        }
        if bytes.len() > FILE_BYTES_MAX {
            return Err(oversized(path));
        }
        let mut header = Header::new_ustar();
        header.set_path(path).map_err(failed)?;
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(EntryType::Regular);
        header.set_cksum();
        builder.append(&header, bytes.as_slice()).map_err(failed)?;
    }
    let archive = builder.into_inner().map_err(failed)?;
    if archive.len() > ARCHIVE_BYTES_MAX {
        return Err(BundleError::format(format!(
            "the archive has {} bytes, the limit is {ARCHIVE_BYTES_MAX}",
            archive.len()
        )));
    }
    Ok(archive)
}

/// Reads an archive and refuses every other form than the one [`write`] makes.
pub(crate) fn read(archive: &[u8]) -> Result<Files, BundleError> {
    if archive.len() > ARCHIVE_BYTES_MAX {
        return Err(BundleError::format(format!(
            "the archive has {} bytes, the limit is {ARCHIVE_BYTES_MAX}",
            archive.len()
        )));
    }
    let failed = |error: std::io::Error| BundleError::format(format!("archive: {error}"));
    let mut files = Files::new();
    let mut reader = Archive::new(archive);
    // Raw: extension headers are entries like others here, and refused by their type.
    for entry in reader.entries().map_err(failed)?.raw(true) {
        let mut entry = entry.map_err(failed)?;
        let path = entry.path_bytes().into_owned();
        let path = String::from_utf8(path)
            .map_err(|_| BundleError::format("a path in the archive is not UTF-8"))?;
        let kind = entry.header().entry_type();
        if kind != EntryType::Regular {
            return Err(BundleError::format(format!(
                "archive entry `{}` is a {}: only regular files are allowed",
                path.escape_debug(),
                describe(kind)
            )));
        }
        if !is_bundle_path(&path) {
            return Err(unknown_path(&path));
        }
        if entry.size() > FILE_BYTES_MAX as u64 {
            return Err(oversized(&path));
        }
        if files.len() == FILES_MAX {
            return Err(BundleError::format(format!(
                "more than {FILES_MAX} files in the archive"
            )));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(failed)?;
        if files.insert(path.clone(), bytes).is_some() {
            return Err(BundleError::format(format!(
                "archive entry `{path}` stands twice"
            )));
        }
    }
    if write(&files)? != archive {
        return Err(BundleError::format(
            "the archive is not in its one deterministic form: make it with `tidelock bundle build`",
        ));
    }
    Ok(files)
}

fn describe(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Link => "hard link",
        EntryType::Symlink => "symbolic link",
        EntryType::Directory => "directory",
        EntryType::Char | EntryType::Block => "device",
        EntryType::Fifo => "named pipe",
        EntryType::XHeader | EntryType::XGlobalHeader => "pax extension header",
        EntryType::GNULongName | EntryType::GNULongLink | EntryType::GNUSparse => "gnu extension",
        _ => "special entry",
    }
}

fn unknown_path(path: &str) -> BundleError {
    BundleError::format(format!(
        "`{}` has no place in a bundle: allowed are {MANIFEST}, {SCHEMA}, {ENTITIES}, {LINKS}, \
         {INPUT_SCHEMA}, {DATA}, policies/*.cedar, policies/*.rego, data/*.json and tests/*.json",
        crate::error::clip(path).escape_debug()
    ))
}

fn oversized(path: &str) -> BundleError {
    BundleError::format(format!("`{path}` is larger than {FILE_BYTES_MAX} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(entries: &[(&str, &[u8])]) -> Files {
        entries
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec()))
            .collect()
    }

    fn entry(path: &[u8], kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(kind);
        header.set_cksum();
        header
    }

    fn tar(entries: &[(Header, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (header, bytes) in entries {
            builder.append(header, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn refusal(archive: &[u8]) -> String {
        match read(archive).unwrap_err() {
            BundleError::Format(message) => message,
            other => panic!("unexpected {other:?}"),
        }
    }

    #[test]
    fn same_files_same_bytes_and_back() {
        let contents = files(&[
            ("tests/a.json", b"[]"),
            ("manifest.json", b"{}"),
            ("policies/b.cedar", b""),
            ("policies/a.cedar", &[7; 513]),
        ]);
        let archive = write(&contents).unwrap();
        assert_eq!(archive, write(&contents.clone()).unwrap());
        assert_eq!(read(&archive).unwrap(), contents);
        // Exactly what ustar says: name, mode, zero owner and time, magic.
        assert_eq!(&archive[..13], b"manifest.json");
        assert_eq!(&archive[100..108], b"0000644\0");
        assert_eq!(&archive[136..148], b"00000000000\0");
        assert_eq!(&archive[257..265], b"ustar\x0000");
    }

    #[test]
    fn anything_but_regular_files_with_known_names_is_refused() {
        let good = entry(b"policies/a.cedar", EntryType::Regular, 2);
        assert!(read(&tar(&[(good.clone(), b"ab")])).is_ok());
        for (kind, word) in [
            (EntryType::Symlink, "symbolic link"),
            (EntryType::Link, "hard link"),
            (EntryType::Directory, "directory"),
            (EntryType::Char, "device"),
            (EntryType::Fifo, "named pipe"),
            (EntryType::XHeader, "pax"),
            (EntryType::XGlobalHeader, "pax"),
            (EntryType::GNULongName, "gnu"),
            (EntryType::GNUSparse, "gnu"),
            (EntryType::Continuous, "special"),
        ] {
            let message = refusal(&tar(&[(entry(b"policies/a.cedar", kind, 0), b"")]));
            assert!(message.contains(word), "{kind:?}: {message}");
        }
        for path in [
            "/manifest.json",
            "../manifest.json",
            "policies/../manifest.json",
            "policies/./a.cedar",
            "./manifest.json",
            "policies//a.cedar",
            "policies/.cedar",
            "policies/a.cedar/",
            "policies/sub/a.cedar",
            "policies/a b.cedar",
            "policies\\a.cedar",
            "Manifest.json",
            "README.md",
            "",
        ] {
            let message = refusal(&tar(&[(
                entry(path.as_bytes(), EntryType::Regular, 0),
                b"",
            )]));
            assert!(
                message.contains("has no place in a bundle"),
                "{path:?}: {message}"
            );
        }
        let message = refusal(&tar(&[(entry(b"\xff.json", EntryType::Regular, 0), b"")]));
        assert!(message.contains("not UTF-8"), "{message}");
    }

    #[test]
    fn duplicates_disorder_and_other_forms_are_refused() {
        let a = entry(b"policies/a.cedar", EntryType::Regular, 1);
        let b = entry(b"policies/b.cedar", EntryType::Regular, 1);
        let good = tar(&[(a.clone(), b"x"), (b.clone(), b"y")]);
        assert!(read(&good).is_ok());
        assert!(refusal(&tar(&[(a.clone(), b"x"), (a.clone(), b"x")])).contains("stands twice"));
        assert!(refusal(&tar(&[(b, b"y"), (a.clone(), b"x")])).contains("deterministic"));

        let mut other_time = a.clone();
        other_time.set_mtime(1);
        other_time.set_cksum();
        assert!(refusal(&tar(&[(other_time, b"x")])).contains("deterministic"));
        let mut other_mode = a.clone();
        other_mode.set_mode(0o755);
        other_mode.set_cksum();
        assert!(refusal(&tar(&[(other_mode, b"x")])).contains("deterministic"));

        let mut trailing = good.clone();
        trailing.extend_from_slice(&[0; 512]);
        assert!(refusal(&trailing).contains("deterministic"));
        let mut padding = good.clone();
        padding[513] = 1;
        assert!(refusal(&padding).contains("deterministic"));
        assert!(read(&good[..good.len() - 512]).is_err());
        assert!(read(&good[..700]).is_err());
        let mut checksum = good;
        checksum[148] ^= 1;
        assert!(read(&checksum).is_err());
    }

    #[test]
    fn oversized_entries_are_refused_before_they_are_read() {
        let limit = FILE_BYTES_MAX as u64;
        let message = refusal(&tar(&[(
            entry(b"entities.json", EntryType::Regular, limit + 1),
            b"",
        )]));
        assert!(message.contains("larger than"), "{message}");
        let exact = vec![b' '; FILE_BYTES_MAX];
        assert!(
            read(&tar(&[(
                entry(b"entities.json", EntryType::Regular, limit),
                &exact
            )]))
            .is_ok()
        );
        assert!(write(&files(&[("entities.json", &vec![0; FILE_BYTES_MAX + 1])])).is_err());
        let two: Files = [("entities.json", &exact), ("schema.cedarschema", &exact)]
            .into_iter()
            .map(|(path, bytes)| (path.to_owned(), bytes.clone()))
            .collect();
        assert!(refusal_of(write(&two)).contains("the limit is"));
        assert!(refusal(&vec![0; ARCHIVE_BYTES_MAX + 1]).contains("the limit is"));
        let many: Vec<String> = (0..=FILES_MAX).map(|n| format!("tests/{n}.json")).collect();
        let headers: Vec<(Header, &[u8])> = many
            .iter()
            .map(|path| (entry(path.as_bytes(), EntryType::Regular, 0), &b""[..]))
            .collect();
        assert!(refusal(&tar(&headers)).contains("more than"));
    }

    fn refusal_of<T: std::fmt::Debug>(result: Result<T, BundleError>) -> String {
        result.unwrap_err().to_string()
    }
}
