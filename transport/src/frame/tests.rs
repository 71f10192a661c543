use proptest::prelude::*;

use super::*;

/// One frame of every type, with the name that its vector has.
fn samples() -> Vec<(&'static str, Frame)> {
    vec![
        (
            "hello",
            Frame::Hello(Box::new(Hello {
                version: 3,
                domain: "site-1".into(),
                node_id: "a".into(),
                limits: WireLimits {
                    kinds: 0b1_1110,
                    max_segment_bytes: 33_554_432,
                    custody_free_bytes: 1_000_000,
                    max_in_flight: 32,
                },
                posture: 1,
                endorsement: Some(vec![0xde, 0xad]),
                state_digest: [7; 32],
            })),
        ),
        (
            "hello_ack",
            Frame::HelloAck(HelloAck {
                frames_per_second: 50_000,
                in_bytes_per_second: 20_000_000,
                in_bytes_left_today: 1_000_000_000,
                out_bytes_per_second: 10_000_000,
            }),
        ),
        (
            "heads",
            Frame::Heads(Heads {
                entries: vec![
                    HeadEntry {
                        origin: OriginRef::New(0, "policy/base".into()),
                        ranges: vec![(1, 4), (9, 9)],
                        tag: [1; 12],
                        newest: vec![RefEntry {
                            id: [8; 32],
                            sequence: 9,
                            size_bytes: 700,
                            prev: None,
                        }],
                    },
                    HeadEntry {
                        origin: OriginRef::Known(300),
                        ranges: vec![(0, 70_000)],
                        tag: [2; 12],
                        newest: Vec::new(),
                    },
                ],
                more: true,
            }),
        ),
        ("get_head", Frame::GetHead(GetHead { origin: 3 })),
        (
            "full_head",
            Frame::FullHead(FullHead {
                origin: 3,
                head: Some(HeadBody {
                    ranges: vec![(0, 11)],
                    last_id: [9; 32],
                }),
            }),
        ),
        (
            "list_refs",
            Frame::ListRefs(ListRefs {
                lists: vec![
                    ListAsked {
                        origin: 3,
                        from: 12,
                        to: 5_000_000_000,
                        max: 400,
                    },
                    ListAsked {
                        origin: 4,
                        from: 0,
                        to: 0,
                        max: 1,
                    },
                ],
            }),
        ),
        (
            "refs",
            Frame::Refs(Refs {
                lists: vec![
                    RefList {
                        origin: 3,
                        refs: vec![
                            RefEntry {
                                id: [4; 32],
                                sequence: 12,
                                size_bytes: 250,
                                prev: None,
                            },
                            RefEntry {
                                id: [5; 32],
                                sequence: 13,
                                size_bytes: 251,
                                prev: Some([4; 32]),
                            },
                        ],
                        done: true,
                    },
                    RefList {
                        origin: 4,
                        refs: Vec::new(),
                        done: true,
                    },
                ],
            }),
        ),
        (
            "fetch",
            Frame::Fetch(Fetch {
                id: [4; 32],
                range: None,
            }),
        ),
        (
            "fetch_range",
            Frame::Fetch(Fetch {
                id: [4; 32],
                range: Some(ByteRange {
                    from: 262_144,
                    to: 524_288,
                }),
            }),
        ),
        (
            "fetch_refused",
            Frame::FetchRefused(FetchRefused {
                id: [4; 32],
                from: None,
                code: 1,
            }),
        ),
        (
            "fetch_range_refused",
            Frame::FetchRefused(FetchRefused {
                id: [4; 32],
                from: Some(262_144),
                code: 2,
            }),
        ),
        (
            "receipt_want",
            Frame::ReceiptWant(ReceiptWant {
                ids: vec![[4; 32], [5; 32]],
            }),
        ),
        (
            "receipt",
            Frame::Receipt(Receipt {
                id: [4; 32],
                receipt: Some(vec![1, 2, 3]),
            }),
        ),
        (
            "receipt_none",
            Frame::Receipt(Receipt {
                id: [5; 32],
                receipt: None,
            }),
        ),
        (
            "bye",
            Frame::Bye(Bye {
                code: 0,
                reason: "the node stops".into(),
            }),
        ),
        ("ask_heads", Frame::AskHeads),
        ("data_stream", Frame::DataStream(DataStream { kind: 4 })),
        (
            "segment",
            Frame::Segment(Segment {
                id: [4; 32],
                size_bytes: 250,
            }),
        ),
        (
            "slice",
            Frame::Slice(Slice {
                id: [4; 32],
                range: ByteRange {
                    from: 262_144,
                    to: 300_000,
                },
                slice_bytes: 38_048,
            }),
        ),
    ]
}

fn decode_one(channel: Channel, bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
    let mut decoder = FrameDecoder::new(channel);
    decoder.push(bytes);
    decoder.next_frame()
}

fn raw(code: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
    bytes.push(code);
    bytes.extend_from_slice(body);
    bytes
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_type_has_a_sample_and_comes_back_whole() {
    let samples = samples();
    for frame in FrameType::ALL {
        assert!(
            samples
                .iter()
                .any(|(_, sample)| sample.frame_type() == *frame),
            "{frame:?}"
        );
        assert_eq!(
            FrameType::from_wire(frame.channel(), *frame as u8),
            Some(*frame)
        );
    }
    for (name, frame) in samples {
        let bytes = frame.encode().unwrap();
        let channel = frame.frame_type().channel();
        assert_eq!(
            decode_one(channel, &bytes),
            Ok(Some(frame.clone())),
            "{name}"
        );
        // Cut anywhere, it is incomplete and never something else.
        for cut in 0..bytes.len() {
            assert_eq!(
                decode_one(channel, &bytes[..cut]),
                Ok(None),
                "{name} cut at {cut}"
            );
        }
    }
}

#[test]
fn frames_arrive_in_any_pieces() {
    let frames: Vec<Frame> = samples()
        .into_iter()
        .map(|(_, frame)| frame)
        .filter(|frame| frame.frame_type().channel() == Channel::Control)
        .collect();
    let bytes: Vec<u8> = frames
        .iter()
        .flat_map(|frame| frame.encode().unwrap())
        .collect();
    for piece in [1, 2, 3, 7, 64, bytes.len()] {
        let mut decoder = FrameDecoder::new(Channel::Control);
        let mut got = Vec::new();
        for chunk in bytes.chunks(piece) {
            decoder.push(chunk);
            while let Some(frame) = decoder.next_frame().unwrap() {
                got.push(frame);
            }
        }
        assert_eq!(got, frames);
        assert_eq!(decoder.held_bytes(), 0);
    }
}

#[test]
fn the_vectors_hold() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/vectors/frames/v3.json"
    );
    let text = std::fs::read_to_string(path).unwrap();
    let vectors: serde_json::Value = serde_json::from_str(&text).unwrap();
    let valid = vectors["valid"].as_array().unwrap();
    let samples = samples();
    assert_eq!(valid.len(), samples.len(), "one vector a sample");
    for (name, frame) in samples {
        let vector = valid.iter().find(|vector| vector["name"] == name).unwrap();
        let bytes = hex(&frame.encode().unwrap());
        assert_eq!(
            vector["bytes"].as_str().unwrap(),
            bytes,
            "{name} changed on the wire"
        );
    }
    let invalid = vectors["invalid"].as_array().unwrap();
    assert!(invalid.len() >= 10);
    for vector in invalid {
        let channel = match vector["channel"].as_str().unwrap() {
            "control" => Channel::Control,
            "data" => Channel::Data,
            other => panic!("channel {other}"),
        };
        let got = decode_one(channel, &unhex(vector["bytes"].as_str().unwrap()));
        let want = vector["error"].as_str().unwrap();
        let message = got.expect_err(&vector["name"].to_string()).to_string();
        assert!(message.contains(want), "{}: {message}", vector["name"]);
    }
}

#[test]
fn a_length_above_the_maximum_is_refused_by_the_header_alone() {
    for frame in FrameType::ALL {
        let max = u32::try_from(frame.max_body_bytes()).unwrap();
        let header = |length: u32| {
            let [a, b, c, d] = length.to_le_bytes();
            FrameHeader::decode(frame.channel(), [a, b, c, d, *frame as u8])
        };
        assert!(header(max).is_ok(), "the control: {frame:?} at its maximum");
        for length in [max + 1, u32::MAX] {
            assert_eq!(
                header(length),
                Err(FrameError::TooLong {
                    frame: *frame,
                    length: length.into(),
                    max: frame.max_body_bytes()
                })
            );
        }
    }
}

#[test]
fn a_frame_of_the_other_stream_is_unknown_here() {
    let fetch = Frame::Fetch(Fetch {
        id: [1; 32],
        range: None,
    })
    .encode()
    .unwrap();
    assert!(decode_one(Channel::Control, &fetch).is_ok(), "the control");
    assert_eq!(
        decode_one(Channel::Data, &fetch),
        Err(FrameError::UnknownType {
            code: 8,
            channel: Channel::Data
        })
    );
    for code in (0..=255u8).filter(|code| !FrameType::ALL.iter().any(|t| *t as u8 == *code)) {
        for channel in [Channel::Control, Channel::Data] {
            assert_eq!(
                decode_one(channel, &raw(code, &[])),
                Err(FrameError::UnknownType { code, channel })
            );
        }
    }
}

#[test]
fn a_huge_count_claims_no_memory() {
    // Heads with 2^60 entries: the count alone, nothing behind it.
    let mut body = vec![253];
    body.extend_from_slice(&(1u64 << 60).to_le_bytes());
    assert_eq!(
        decode_one(Channel::Control, &raw(FrameType::Heads as u8, &body)),
        Err(FrameError::Malformed {
            frame: FrameType::Heads,
            detail: "body does not decode"
        })
    );
}

#[test]
fn one_frame_has_one_encoding() {
    let short = Frame::GetHead(GetHead { origin: 3 }).encode().unwrap();
    assert_eq!(short, raw(4, &[3]), "the control");
    // The same number as a two-byte integer.
    assert_eq!(
        decode_one(Channel::Control, &raw(4, &[251, 3, 0])),
        Err(FrameError::Malformed {
            frame: FrameType::GetHead,
            detail: "body is not in its shortest encoding"
        })
    );
    assert_eq!(
        decode_one(Channel::Control, &raw(4, &[3, 0])),
        Err(FrameError::Malformed {
            frame: FrameType::GetHead,
            detail: "bytes after the body"
        })
    );
}

#[test]
fn fields_have_limits_of_their_own_in_both_directions() {
    let full = |ranges: &[(u64, u64)]| FullHead {
        origin: 0,
        head: Some(HeadBody {
            ranges: ranges.to_vec(),
            last_id: [0; 32],
        }),
    };
    let ranges = |ranges: &[(u64, u64)]| Frame::FullHead(full(ranges));
    assert!(ranges(&[(0, 1), (3, 3)]).encode().is_ok(), "the control");
    let many: Vec<(u64, u64)> = (0..33).map(|at| (at * 2, at * 2)).collect();
    assert!(ranges(&many[..32]).encode().is_ok(), "the control");
    for wrong in [
        &[][..],
        &[(2, 1)],
        &[(0, 1), (2, 3)],
        &[(5, 6), (0, 1)],
        &[(0, u64::MAX), (0, 1)],
        &many,
    ] {
        assert!(ranges(wrong).encode().is_err(), "{wrong:?}");
        // A sender that does not check: the receiver does.
        let body = bincode::encode_to_vec(full(wrong), config()).unwrap();
        assert!(
            decode_one(Channel::Control, &raw(5, &body)).is_err(),
            "{wrong:?}"
        );
    }
    let list = |from, to, max| {
        Frame::ListRefs(ListRefs {
            lists: vec![ListAsked {
                origin: 0,
                from,
                to,
                max,
            }],
        })
        .encode()
    };
    assert!(
        list(1, 1, 1).is_ok() && list(1, 1, 504).is_ok(),
        "the control"
    );
    assert!(list(2, 1, 1).is_err() && list(1, 1, 0).is_err() && list(1, 1, 505).is_err());
    let bye = |reason: String| Frame::Bye(Bye { code: 0, reason }).encode();
    assert!(bye("x".repeat(MAX_REASON_BYTES)).is_ok(), "the control");
    assert!(bye("x".repeat(MAX_REASON_BYTES + 1)).is_err());
    assert!(
        Frame::FetchRefused(FetchRefused {
            id: [0; 32],
            from: None,
            code: 9
        })
        .encode()
        .is_err()
    );
}

#[test]
fn a_range_is_of_whole_groups_and_bounded_in_both_directions() {
    let group = GROUP_BYTES;
    let fetch = |from, to| Fetch {
        id: [1; 32],
        range: Some(ByteRange { from, to }),
    };
    let slice = |from, to| Slice {
        id: [1; 32],
        range: ByteRange { from, to },
        slice_bytes: 1,
    };
    for (from, to) in [(0, group), (group, group + 1), (0, MAX_RANGE_BYTES)] {
        assert!(
            Frame::Fetch(fetch(from, to)).encode().is_ok(),
            "the control"
        );
        assert!(
            Frame::Slice(slice(from, to)).encode().is_ok(),
            "the control"
        );
    }
    for (from, to) in [
        (0, 0),
        (group, group),
        (group, 0),
        (1, group),
        (0, MAX_RANGE_BYTES + 1),
        (u64::MAX, 0),
    ] {
        assert!(Frame::Fetch(fetch(from, to)).encode().is_err());
        assert!(Frame::Slice(slice(from, to)).encode().is_err());
        // A sender that does not check: the receiver does.
        let body = bincode::encode_to_vec(fetch(from, to), config()).unwrap();
        assert!(decode_one(Channel::Control, &raw(8, &body)).is_err());
        let body = bincode::encode_to_vec(slice(from, to), config()).unwrap();
        assert!(decode_one(Channel::Data, &raw(34, &body)).is_err());
    }
}

/// A node of version 1 must be told `version`, so its Hello has to be readable for ever.
#[test]
fn the_hello_of_version_1_can_still_be_read() {
    let bytes = unhex(
        "3b000000010106736974652d3101611efc00000002fc40420f0020010102dead07070707070707070707070707\
         07070707070707070707070707070707070707",
    );
    match decode_one(Channel::Control, &bytes) {
        Ok(Some(Frame::Hello(hello))) => assert_eq!(hello.version, 1),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_widest_frames_fit() {
    let range = ByteRange {
        from: u64::MAX - GROUP_BYTES + 1,
        to: u64::MAX,
    };
    let id = [255; 32];
    for frame in [
        Frame::Fetch(Fetch {
            id,
            range: Some(range),
        }),
        Frame::FetchRefused(FetchRefused {
            id,
            from: Some(u64::MAX),
            code: 3,
        }),
        Frame::Slice(Slice {
            id,
            range,
            slice_bytes: u64::MAX,
        }),
    ] {
        let bytes = frame.encode().unwrap();
        let channel = frame.frame_type().channel();
        assert_eq!(decode_one(channel, &bytes), Ok(Some(frame)));
    }
    let reference = RefEntry {
        id: [255; 32],
        sequence: u64::MAX,
        size_bytes: u64::MAX,
        prev: Some([255; 32]),
    };
    let entry = |at: u32| HeadEntry {
        origin: OriginRef::New(u32::MAX - at, "x".repeat(MAX_ORIGIN_BYTES)),
        ranges: (0..MAX_RANGES as u64)
            .map(|at| (u64::MAX / 2 + at * 3, u64::MAX / 2 + at * 3 + 1))
            .collect(),
        tag: [255; 12],
        newest: vec![reference; MAX_NEWEST_REFS],
    };
    let heads = Frame::Heads(Heads {
        entries: (0..64).map(entry).collect(),
        more: true,
    });
    let bytes = heads.encode().unwrap();
    assert_eq!(decode_one(Channel::Control, &bytes), Ok(Some(heads)));
    let list = |refs| RefList {
        origin: u32::MAX,
        refs: vec![reference; refs],
        done: false,
    };
    // As many references as there may be, over as many lists as there may be.
    let mut lists = vec![list(1); MAX_LISTS_PER_FRAME - 1];
    lists.push(list(MAX_REFS_PER_FRAME - lists.len()));
    let refs = Frame::Refs(Refs {
        lists: lists.clone(),
    });
    let bytes = refs.encode().unwrap();
    assert_eq!(decode_one(Channel::Control, &bytes), Ok(Some(refs)));
    lists.push(list(0));
    assert!(Frame::Refs(Refs { lists }).encode().is_err());
    let asked = |lists| {
        let list = ListAsked {
            origin: u32::MAX,
            from: u64::MAX,
            to: u64::MAX,
            max: 1,
        };
        Frame::ListRefs(ListRefs {
            lists: vec![list; lists],
        })
    };
    let bytes = asked(MAX_LISTS_PER_FRAME).encode().unwrap();
    assert_eq!(
        decode_one(Channel::Control, &bytes),
        Ok(Some(asked(MAX_LISTS_PER_FRAME)))
    );
    assert!(asked(MAX_LISTS_PER_FRAME + 1).encode().is_err());
}

#[test]
fn reasons_are_cut_at_a_characters_edge() {
    assert_eq!(bounded_reason("short"), "short");
    let long = "é".repeat(MAX_REASON_BYTES);
    let cut = bounded_reason(&long);
    assert!(cut.len() <= MAX_REASON_BYTES && long.starts_with(&cut));
    let odd = format!("x{long}");
    assert_eq!(bounded_reason(&odd).len(), MAX_REASON_BYTES - 1);
}

#[test]
fn codes_have_one_number_and_one_word() {
    for code in CloseCode::ALL {
        assert_eq!(CloseCode::from_wire(u64::from(*code as u32)), Some(*code));
        let same = CloseCode::ALL
            .iter()
            .filter(|other| other.as_str() == code.as_str());
        assert_eq!(same.count(), 1);
    }
    assert_eq!(CloseCode::from_wire(CloseCode::ALL.len() as u64), None);
}

#[test]
fn the_protocol_page_lists_every_frame_and_every_code() {
    let page = include_str!("../../../docs/src/protocol.md");
    for frame in FrameType::ALL {
        let stream = match frame.channel() {
            Channel::Control => "control",
            Channel::Data => "data",
        };
        let max = frame.max_body_bytes();
        let max = match max / 1_000 {
            0 => format!("{max}"),
            thousands => format!("{thousands},{:03}", max % 1_000),
        };
        let row = format!("| {} | {frame:?} | {stream} | {max} |", *frame as u8);
        assert!(page.contains(&row), "no row {row}");
    }
    for code in CloseCode::ALL {
        let row = format!("| {} | `{}` |", *code as u32, code.as_str());
        assert!(page.contains(&row), "no row {row}");
    }
}

#[test]
fn a_broken_stream_stays_broken_and_holds_nothing() {
    let mut decoder = FrameDecoder::new(Channel::Control);
    decoder.push(&raw(99, &[]));
    let error = decoder.next_frame().unwrap_err();
    decoder.push(&Frame::AskHeads.encode().unwrap());
    assert_eq!(decoder.next_frame(), Err(error));
    assert_eq!(decoder.held_bytes(), 0);
}

proptest! {
    /// INV-07 and the no-panic rule: whatever arrives, the decoder answers and stays small.
    #[test]
    fn random_bytes_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..4_000),
        piece in 1usize..600,
        data in any::<bool>(),
    ) {
        let channel = if data { Channel::Data } else { Channel::Control };
        let mut decoder = FrameDecoder::new(channel);
        for chunk in bytes.chunks(piece) {
            decoder.push(chunk);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => prop_assert_eq!(frame.frame_type().channel(), channel),
                    Ok(None) => break,
                    Err(_) => {
                        prop_assert_eq!(decoder.held_bytes(), 0);
                        break;
                    }
                }
            }
            let most = FRAME_HEADER_BYTES + MAX_FRAME_BODY_BYTES + piece;
            prop_assert!(decoder.held_bytes() <= most);
        }
    }

    /// A valid type and length before random bytes: reaches the bodies, which pure noise rarely does.
    #[test]
    fn random_bodies_never_panic_and_what_decodes_is_canonical(
        at in 0usize..FrameType::ALL.len(),
        body in proptest::collection::vec(any::<u8>(), 0..2_000),
    ) {
        let frame = FrameType::ALL[at];
        let body = &body[..body.len().min(frame.max_body_bytes())];
        let bytes = raw(frame as u8, body);
        if let Ok(Some(decoded)) = decode_one(frame.channel(), &bytes) {
            prop_assert_eq!(decoded.encode().unwrap(), bytes);
        }
    }

    /// One flipped bit in a valid frame: refused, or another canonical frame; never a panic.
    #[test]
    fn flipped_bits_never_panic(at in 0usize..samples().len(), bit in any::<usize>()) {
        let (_, frame) = samples().swap_remove(at);
        let mut bytes = frame.encode().unwrap();
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(Some(decoded)) = decode_one(frame.frame_type().channel(), &bytes) {
            let again = decoded.encode().unwrap();
            prop_assert_eq!(&bytes[..again.len()], again.as_slice());
        }
    }
}
