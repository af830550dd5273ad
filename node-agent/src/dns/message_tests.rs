//! Reading what was written, and any other bytes.

use proptest::prelude::*;

use super::*;

#[test]
fn a_query_is_read_as_it_was_written() {
    let name = Name::from_text("Web.default.svc.cluster.local.").unwrap();
    let query = parse_query(&encode_query(7, &name, rtype::A)).unwrap();
    assert_eq!((query.id, query.qtype, query.qclass), (7, rtype::A, CLASS_IN));
    assert_eq!(query.name.labels(), ["web", "default", "svc", "cluster", "local"]);
}

#[test]
fn responses_and_short_messages_are_ignored_other_opcodes_not_implemented() {
    let name = Name::from_text("a.b").unwrap();
    let mut bytes = encode_query(7, &name, rtype::A);
    bytes[2] |= 0x80;
    assert_eq!(parse_query(&bytes), Err(Unreadable::Ignore));
    assert_eq!(parse_query(&bytes[..11]), Err(Unreadable::Ignore));
    bytes[2] = 0x28;
    let refused = Unreadable::Refuse { id: 7, opcode_bits: 0x2800, rcode: Rcode::NotImp };
    assert_eq!(parse_query(&bytes), Err(refused));
}

#[test]
fn a_pointer_loop_or_a_cut_question_is_malformed() {
    let name = Name::from_text("a.b").unwrap();
    let whole = encode_query(7, &name, rtype::A);
    let malformed = Unreadable::Refuse { id: 7, opcode_bits: 0, rcode: Rcode::FormErr };
    for length in 12..whole.len() {
        assert_eq!(parse_query(&whole[..length]), Err(malformed.clone()), "{length}");
    }
    let mut looped = whole[..12].to_vec();
    looped.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
    assert_eq!(parse_query(&looped), Err(malformed));
}

#[test]
fn names_outside_the_limits_are_none() {
    let label = "x".repeat(63);
    assert!(Name::from_text(&label).is_some());
    assert!(Name::from_text(&"x".repeat(64)).is_none());
    assert!(Name::from_text(&[label.as_str(); 4].join(".")).is_none());
    assert!(Name::from_text("a..b").is_none());
}

proptest! {
    #[test]
    fn no_bytes_make_the_readers_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200), shape in any::<bool>()
    ) {
        if shape && bytes.len() > 12 {
            // Close to a real query, so that the readers get past the header.
            bytes[2] &= 0x01;
            bytes[4..12].copy_from_slice(&[0, 1, 0, 1, 0, 0, 0, 1]);
        }
        if let Ok(query) = parse_query(&bytes) {
            let response = Response {
                rcode: Rcode::NoError, authoritative: true, answers: vec![], authority: vec![],
            };
            let encoded = encode_response(&query, &response, 512);
            prop_assert!(parse_upstream(&encoded).is_some());
        }
        let _seen = (parse_upstream(&bytes), is_answer_to(&bytes, &bytes));
    }

    #[test]
    fn a_response_never_exceeds_its_limit_and_says_when_it_is_cut(
        count in 0_u8..120, limit in 512_usize..1400, edns in any::<bool>()
    ) {
        let name = Name::from_text("headless.default.svc.cluster.local").unwrap();
        let mut query = parse_query(&encode_query(7, &name, rtype::A)).unwrap();
        query.edns = edns.then_some(Edns { udp_size: 1232, version: 0 });
        let answers: Vec<_> = (0..count)
            .map(|n| Record { owner: None, ttl: 5, data: Data::A([10, 0, 0, n].into()) })
            .collect();
        let response =
            Response { rcode: Rcode::NoError, authoritative: true, answers, authority: vec![] };
        let bytes = encode_response(&query, &response, limit);
        prop_assert!(bytes.len() <= limit);
        let read = parse_upstream(&bytes).unwrap();
        prop_assert_eq!(read.truncated, read.answers.len() < usize::from(count));
        prop_assert!(is_answer_to(&bytes, &encode_query(7, &name, rtype::A)));
    }
}
