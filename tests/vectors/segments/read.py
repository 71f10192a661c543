#!/usr/bin/env python3
"""A second reader of the formats of docs/src/format.md.

Shares no code with the crate. Reads every vector of a directory (by default its own), checks each byte
of it that the page describes, and ends with 0 if all agree, 1 if one does not, 3 if a package is missing.
"""

import base64
import hashlib
import json
import pathlib
import struct
import sys

try:
    import blake3
    import zstandard
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.keywrap import aes_key_unwrap
except ImportError as missing:
    print(f"missing: {missing}", file=sys.stderr)
    sys.exit(3)

KINDS = {1: "revocation", 2: "policy", 3: "witness", 4: "audit"}


def need(condition, what):
    if not condition:
        raise ValueError(what)


def crc32c(data, crc=0):
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def named(role, digest):
    return f"{role}:{digest.hex()}"


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        need(self.at + count <= len(self.data), "truncated")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, width):
        return int.from_bytes(self.take(width), "little")

    def sized(self, width=8):
        return self.take(self.number(width))

    def text(self):
        return self.sized().decode()

    def optional_hash(self):
        present = self.number(1)
        need(present in (0, 1), "neither 0 nor 1")
        return self.take(32) if present else None

    def end(self):
        need(self.at == len(self.data), "bytes left over")


def signed(public, signature, message):
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        raise ValueError("bad signature") from None


# ---- the tree (RFC 6962)


def leaf_hash(record):
    return sha256(b"\0", record)


def node_hash(left, right):
    return sha256(b"\1", left, right)


def half(n):
    return 1 << (n - 1).bit_length() - 1


def frontier_root(hashes):
    if not hashes:
        return sha256()
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root


def frontier_append(size, hashes, leaf):
    while size & 1:
        leaf = node_hash(hashes.pop(), leaf)
        size >>= 1
    hashes.append(leaf)


def path_root(leaf, index, size, path):
    if size == 1:
        need(not path, "path too long")
        return leaf
    need(path, "path too short")
    k = half(size)
    if index < k:
        return node_hash(path_root(leaf, index, k, path[:-1]), path[-1])
    return node_hash(path[-1], path_root(leaf, index - k, size - k, path[:-1]))


def consistency_roots(old, size, whole, old_root, path):
    if old == size:
        if whole:
            need(not path, "path too long")
            return old_root, old_root
        need(len(path) == 1, "path of wrong length")
        return path[0], path[0]
    need(path, "path too short")
    k = half(size)
    if old <= k:
        before, after = consistency_roots(old, k, whole, old_root, path[:-1])
        return before, node_hash(after, path[-1])
    before, after = consistency_roots(old - k, size - k, False, old_root, path[:-1])
    return node_hash(path[-1], before), node_hash(path[-1], after)


def checkpoint(note, key=None):
    """Origin line, size and root; with a key, its signature is checked too."""
    text, signatures = note.split("\n\n")
    line, size, root = text.split("\n")
    need(str(int(size)) == size, "size not canonical")
    if key:
        blobs = [s.split(" ") for s in signatures.rstrip("\n").split("\n")]
        own = [base64.b64decode(b[2]) for b in blobs if b[0] == "\u2014" and b[1] == line]
        key_id = sha256(line.encode(), b"\n\1", key)[:4]
        own = [b[4:] for b in own if b[:4] == key_id]
        need(own, "no signature by the key")
        signed(key, own[0], (text + "\n").encode())
    return line, int(size), base64.b64decode(root, validate=True)


# ---- segments


def read_header(r):
    out = {"kind": KINDS[r.number(1)], "domain": r.text(), "origin": r.text(), "sequence": r.number(8)}
    prev = r.optional_hash()
    out["prev"] = named("blake3", prev) if prev else None
    out["created_unix_ms"] = r.number(8)
    return out


def read_endorsement(r):
    node, key, incarnation = r.text(), r.take(32), r.number(8)
    chain = [r.sized() for _ in range(r.number(8))]
    r.number(2)
    r.sized()
    return node, key, incarnation, chain


def endorsement_message(node, key, incarnation, chain):
    out = b"tidelock log key endorsement v1\0"
    for part in [node.encode(), key, struct.pack("<Q", incarnation), *chain]:
        out += struct.pack("<Q", len(part)) + part
    return out


def read_records(raw, count):
    r = Reader(raw)
    out = []
    for _ in range(count):
        length = r.number(4)
        need(1 <= length <= 65535, "record length")
        out.append(r.take(length))
    r.end()
    return out


def read_body(body, header, key, vector):
    r = Reader(body)
    version, first, count = r.number(2), r.number(8), r.number(4)
    need(version == vector.get("body_version", 1) and count > 0, "version or count")
    before = [r.take(32) for _ in range(first.bit_count())]
    note = r.sized(4).decode()
    line, size, root = checkpoint(note, key)
    need(line == f"tidelock/{header['domain']}/" + header["origin"].removeprefix("audit/"), "origin line")
    need(size == first + count, "size")
    after = None
    if version == 1:
        records = read_records(r.take(len(body) - r.at), count)
    else:
        flags = r.number(1)
        need(flags < 4, "flags")
        zstd, encrypted = flags & 1, flags >> 1
        after = [r.take(32) for _ in range(size.bit_count())]
        need(frontier_root(after) == root, "frontier after")
        segment_key = None
        if encrypted:
            for _ in range(r.number(1)):
                scheme, wrapped = r.number(1), r.sized(2)
                if scheme == 1:
                    segment_key = aes_key_unwrap(bytes.fromhex(vector["site_key_hex"]), wrapped)
        index = [(r.number(4), r.number(4), r.number(4)) for _ in range(r.number(4))]
        aad = b"tidelock audit block v2\0" + sha256(body[: r.at])
        ends = [first_record for first_record, _, _ in index[1:]] + [count]
        records = []
        for number, ((start, raw_length, stored_length), end) in enumerate(zip(index, ends)):
            need(start == len(records), "first record of a block")
            block = r.take(stored_length)
            if encrypted and not (first == 0 and number == 0):
                block = AESGCM(segment_key).decrypt(number.to_bytes(12, "little"), block, aad)
            elif encrypted:
                need(end == 1, "record 0 not alone")
            if zstd:
                frame = zstandard.ZstdDecompressor().decompressobj()
                block = frame.decompress(block)
                need(frame.eof and not frame.unused_data, "not one frame")
            need(len(block) == raw_length, "raw length")
            need(raw_length <= 65536 or end - start == 1, "block too long")
            records += read_records(block, end - start)
    r.end()
    leaves = [leaf_hash(record) for record in records]
    frontier = list(before)
    for at, leaf in enumerate(leaves):
        frontier_append(first + at, frontier, leaf)
    need(frontier_root(frontier) == root, "root")
    need(after is None or after == frontier, "frontier after")
    need((vector["first"], vector["last"]) == (first, size - 1), "span")
    need(vector["root"] == named("sha256", root), "stated root")
    stated = [record["leaf"] for record in vector["records"]]
    need(stated == [named("sha256", leaf) for leaf in leaves], "leaves")


def segment(vector):
    data = bytes.fromhex(vector["hex"])
    need(vector["id"] == "blake3:" + blake3.blake3(data).hexdigest(), "id")
    r = Reader(data)
    need(r.take(8) == b"TIDESEG1", "magic")
    header_reader = Reader(r.sized(4))
    header = read_header(header_reader)
    header_reader.end()
    need(header == vector["header"], "header")
    body = r.take(r.number(8))
    prefix = blake3.blake3(data[: r.at]).digest()
    trailer = Reader(r.sized(4))
    r.end()
    if trailer.number(1):
        key, signature = trailer.take(32), trailer.take(64)
        signed(key, signature, b"tidelock segment v1\0" + prefix)
        node, endorsed, incarnation, _ = read_endorsement(trailer)
        origin = f"audit/{node}/{sha256(key).hex()[:16]}/{incarnation}"
        need(endorsed == key and header["origin"] == origin, "signer")
        read_body(body, header, key, vector)
    else:
        need(header["kind"] != "audit" and body.hex() == vector["body_hex"], "body")
    trailer.end()


# ---- the rest


def receipt(vector):
    r = Reader(bytes.fromhex(vector["hex"]))
    fields = {"domain": r.text(), "origin": r.text()}
    fields["segment_id"] = named("blake3", r.take(32))
    fields["first"], fields["last"] = r.number(8), r.number(8)
    fields["root_at_last"] = named("sha256", r.take(32))
    fields["custodian"], fields["issued_unix_ms"] = r.text(), r.number(8)
    signer, signature = r.take(32), r.take(64)
    fields["signer"] = signer.hex()
    node, key, _, _ = read_endorsement(r)
    r.end()
    need(node == fields["custodian"] and key == signer, "signer")
    need(fields == vector["fields"], "fields")
    message = b"tidelock custody receipt v1\0"
    for part in [
        fields["domain"].encode(),
        fields["origin"].encode(),
        bytes.fromhex(fields["segment_id"][7:]),
        struct.pack("<Q", fields["first"]),
        struct.pack("<Q", fields["last"]),
        bytes.fromhex(fields["root_at_last"][7:]),
        fields["custodian"].encode(),
        struct.pack("<Q", fields["issued_unix_ms"]),
    ]:
        message += struct.pack("<Q", len(part)) + part
    need(message.hex() == vector["message_hex"], "message")
    signed(signer, signature, message)


def endorsement(vector):
    r = Reader(bytes.fromhex(vector["hex"]))
    need(endorsement_message(*read_endorsement(r)).hex() == vector["message_hex"], "message")
    r.end()


MARK = 0x80000000


def log_frame(data, at, salt):
    """Length field, payload and the offset after the frame; None if there is no valid one."""
    try:
        r = Reader(data)
        r.at = at
        length, crc = r.number(4), r.number(4)
        payload = r.take(length & ~MARK)
        if crc32c(struct.pack("<QI", at, length) + payload, salt) != crc:
            return None
        need(not any(r.take(-len(payload) % 8)), "padding")
    except ValueError:
        return None
    return length, payload, r.at


def log_mark(data, at, salt):
    """Size, signed size, signature, count, bytes and root of the mark there; None if there is none."""
    if len(data) < at + 4 or int.from_bytes(data[at : at + 4], "little") != MARK | 120:
        return None  # almost every sector, before its checksum is made
    found = log_frame(data, at, salt)
    return found and struct.unpack("<QQ64sII32s", found[1])


def active_batches(data, at, size, frontier, salt, key, line):
    """The batches up to the first that is not valid."""
    batches, roots, signature = [], {size: frontier_root(frontier)}, None
    while mark := log_mark(data, at, salt):
        below, signed_size, signed_head, count, length, root = mark
        need(below == size and signed_size <= size, "size in a mark")
        records, tree, end, inside = [], list(frontier), at + length, at + 8 + 120
        while inside < end and (found := log_frame(data, inside, salt)):
            if not 1 <= found[0] <= 65535:
                break
            frontier_append(size + len(records), tree, leaf_hash(found[1]))
            records.append(found[1].decode())
            inside = found[2]
        after = end + -end % 512
        if inside != end or len(records) != count or frontier_root(tree) != root or any(data[end:after]):
            break
        batches.append({"offset": at, "size": size, "records": records})
        size, frontier, at = size + count, tree, after
        roots[size], signature = root, (signed_size, signed_head)
        # The page has the newest one alone verified. Those of earlier files are judged there.
        if signed_size in roots:
            text = f"{line}\n{signed_size}\n{base64.b64encode(roots[signed_size]).decode()}\n"
            signed(key, signed_head, text.encode())
    need(signature and signature[0] in roots, "no signed head")
    # What a later mark attests was acknowledged: not a torn tail.
    for later in range(at + 512, len(data), 512):
        mark = log_mark(data, later, salt)
        need(not mark or mark[0] < size, "acknowledged data is damaged")
    return at, batches


def active_frames_1(data, at, size, frontier, salt, key, line):
    """The frames of the version before."""
    records, marks = [], 0
    while found := log_frame(data, at, salt):
        length, payload, at = found
        if length & MARK:
            need(len(payload) == 104, "mark")
            root = payload[8:40]
            need((int.from_bytes(payload[:8], "little"), root) == (size, frontier_root(frontier)), "mark's tree")
            text = f"{line}\n{size}\n{base64.b64encode(root).decode()}\n"
            signed(key, payload[40:], text.encode())
            marks += 1
        else:
            need(1 <= length <= 65535, "record length")
            frontier_append(size, frontier, leaf_hash(payload))
            size += 1
            records.append(payload.decode())
    need(marks, "no mark")
    need(not any(data[at:]), "bytes behind the last frame")
    return records


def active(vector):
    data = bytes.fromhex(vector["hex_without_trailing_zeros"])
    data += bytes(vector["file_bytes"] - len(data))
    r = Reader(data)
    magic = r.take(8)
    need(magic in (b"TIDELOG1", b"TIDELOG2"), "magic")
    length, crc = r.number(4), r.number(4)
    head = Reader(r.take(length))
    need(crc32c(head.data) == crc, "checksum of the header")
    need(r.at <= 4096 and not any(data[r.at : 4096]), "rest of the header's block")
    domain, origin, key, sequence = head.text(), head.text(), head.take(32), head.number(8)
    if magic == b"TIDELOG1":
        head.optional_hash()
    first = head.number(8)
    frontier = [head.take(32) for _ in range(head.number(8))]
    need(len(frontier) == first.bit_count(), "frontier")
    need(head.number(8) == len(data) >= 128 * 1024, "file length")
    head.number(8)
    need(origin.split("/")[2] == sha256(key).hex()[:16], "fingerprint")
    line = f"tidelock/{domain}/" + origin.removeprefix("audit/")
    if magic == b"TIDELOG1":
        head.end()
        salt = sha256(f"{domain}\n{origin}\n".encode(), struct.pack("<Q", sequence))[:4]
        salt = int.from_bytes(salt, "little")
        records = active_frames_1(data, 4096, first, frontier, salt, key, line)
        need((first, records) == (vector["first_index"], vector["records"]), "records")
        return
    salt, stale = head.number(4), head.number(1)
    head.end()
    need(stale in (0, 1) and (sequence, bool(stale)) == (vector["sequence"], vector["stale"]), "header")
    private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["log_seed_hex"]))
    need(private.public_key().public_bytes_raw() == key, "log key")
    secret = private.sign(f"tidelock log salt v1\0{origin}\n{sequence}".encode())
    need(salt == int.from_bytes(sha256(secret)[:4], "little"), "salt")
    end, batches = active_batches(data, 4096, first, frontier, salt, key, line)
    need(batches == vector["batches"], "batches")
    # Only a file that was used before has bytes behind its end.
    need(stale or not any(data[end:]), "bytes behind the last batch")


def state(vector):
    r = Reader(bytes.fromhex(vector["hex"]))
    magic = r.take(8)
    need(magic in (b"TIDESTA2", b"TIDESTA3", b"TIDESTA4"), "magic")
    crc = r.number(4)
    need(crc32c(r.data[r.at :]) == crc, "checksum")
    need((r.text(), r.text(), r.number(8)) == (vector["node"], vector["origin"], vector["incarnation"]), "log")
    r.text(), r.number(8), r.number(8)  # the marker
    sequence, prev, size = r.number(8), r.optional_hash(), r.number(8)
    frontier = [r.take(32) for _ in range(r.number(8))]
    need(len(frontier) == size.bit_count(), "frontier")
    need((prev is None) == (sequence == 0), "prev")
    need(prev is None or named("blake3", prev) in vector["sealed_ids"], "prev is no sealed segment")
    cursors = []
    for _ in range(r.number(8)):
        cursor = {"origin": r.text(), "min_index": r.number(8), "min_sequence": r.number(8)}
        root = r.optional_hash()
        cursors.append(cursor | {"root": named("sha256", root) if root else None})
    need(cursors == vector["cursors"], "cursors")
    for _ in range(r.number(8)):
        json.loads(r.sized())
    if magic != b"TIDESTA2":
        superseded = r.number(1)
        need(superseded in (0, 1) and bool(superseded) == vector["superseded"], "superseded")
        names = [{"origin": r.text(), "size": r.number(8)} for _ in range(r.number(8))]
        need(names == vector["named"], "named")
    if magic == b"TIDESTA4":
        given = r.number(1)
        need(given in (0, 1), "contradicted")
        contradicted = {"sequence": r.number(8), "id": named("blake3", r.take(32))} if given else None
        need(contradicted == vector["contradicted"], "contradicted")
        need(contradicted is None or superseded, "contradicted, and not superseded")
    r.end()


def unnamed(text):
    need(text.startswith("sha256:") and len(text) == 71, "hash")
    return bytes.fromhex(text[7:])


def proof(vector):
    key, given = bytes.fromhex(vector["log_key_hex"]), vector["proof"]
    need(given["v"] == 1, "version")
    path = [unnamed(text) for text in given["path"]]
    if given["type"] == "record":
        line, size, root = checkpoint(given["checkpoint"], key)
        record = base64.b64decode(given["record_base64"], validate=True)
        need(0 <= given["index"] < size, "index")
        need(path_root(leaf_hash(record), given["index"], size, path) == root, "root")
    else:
        line, old, old_root = checkpoint(given["older"], key)
        newer, size, root = checkpoint(given["newer"], key)
        need(newer == line and 0 < old <= size, "other logs or sizes")
        need(consistency_roots(old, size, True, old_root, path) == (old_root, root), "roots")
    need(line == vector["origin_line"], "origin line")


def mark(r, kind):
    if kind == 1:
        ref = {"id": named("blake3", r.take(32)), "kind": KINDS[r.number(1)], "origin": r.text()}
        ref |= {"sequence": r.number(8), "size_bytes": r.number(8)}
        prev = r.optional_hash()
        return {"segment": ref | {"prev": named("blake3", prev) if prev else None}}
    return {"receipt": {"segment_id": named("blake3", r.take(32)), "custodian": r.text()}}


def volume(vector):
    r = Reader(bytes.fromhex(vector["hex"]))

    def check():
        need(blake3.blake3(r.data[: r.at]).digest() == r.take(32), "hash of all before")

    need(r.take(8) == b"TIDEVOL1", "magic")
    head = Reader(r.take(r.number(4)))
    check()
    header = {"domain": head.text(), "exporter": head.text()}
    header["addressee"] = head.text() if head.number(1) else None
    header |= {"export_id": list(head.take(16)), "number": head.number(4), "created_unix_ms": head.number(8)}
    head.end()
    need(header == vector["header"], "header")
    entries, places = [], []
    while True:
        at, tag, front, body = r.at, r.number(1), r.number(4), r.number(4)
        front, body = Reader(r.take(front)), r.take(body)
        check()
        if tag == 3:
            break
        need(tag in (1, 2), "tag")
        entries.append(mark(front, tag))
        front.end()
        places.append((at, entries[-1]))
        if tag == 1:
            ref = entries[-1]["segment"]
            need((named("blake3", blake3.blake3(body).digest()), len(body)) == (ref["id"], ref["size_bytes"]), "id")
    front.end()
    r.end()
    need(entries == vector["entries"], "entries")
    index = Reader(body)
    need(bool(index.number(1)) == vector["last"], "last")
    need([(index.number(8), mark(index, index.number(4) + 1)) for _ in range(index.number(8))] == places, "index")
    index.end()


def read(path):
    vector = json.loads(path.read_text())
    name = path.stem
    if name == "checkpoint":
        checkpoint(vector["note"], bytes.fromhex(vector["log_key_hex"]))
    elif name in ("receipt", "endorsement", "volume"):
        globals()[name](vector)
    elif name.startswith("state"):
        state(vector)
    elif name.startswith("active"):
        active(vector)
    elif name.startswith("proof-"):
        proof(vector)
    else:
        segment(vector)


def main():
    where = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    paths = sorted((where if where.is_dir() else where.parent).glob("*.json"))
    bad = 0
    for path in paths:
        try:
            read(path)
        except Exception as error:  # whatever goes wrong, the vector was not read
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            bad += 1
    print(f"read {len(paths) - bad} vectors, {bad} bad")
    sys.exit(1 if bad or not paths else 0)


main()
