//! Packets that are cut short, changed at random, or nonsense: no program trusts a byte.

#[cfg(test)]
mod tests {
    use ebpf_common::verdict::DropReason;
    use node_agent::dataplane::load::TcHook;

    use crate::{
        chance::Random,
        frame::{Frame, SCTP, checksum},
        kernel::{DROP, Family, Kernel, PASS, REDIRECT, hex, with_kernel},
        made::{least, packets, serve},
    };

    #[test]
    fn cut_short_in_a_header_is_malformed_and_nothing_else_is() {
        with_kernel(|kernel, at| {
            let least = least(at);
            for (frame, transport) in [
                (Frame::tcp((at.pod, 40_000), (at.client, 80)), 14),
                (Frame::udp((at.pod, 40_000), (at.client, 80)), 8),
                (Frame::new(SCTP, (at.pod, 40_000), (at.client, 80)), 14),
                (Frame::ping((at.pod, 7), at.client), 8),
            ] {
                let whole = frame.bytes();
                for length in least..least + transport {
                    kernel.drops_for("tc_from_pod", &whole[..length], DropReason::Malformed);
                }
                let (verdict, _) = kernel.run("tc_from_pod", &whole);
                assert_eq!(verdict, REDIRECT);
            }
        });
    }

    #[test]
    fn a_header_that_contradicts_itself_is_malformed() {
        with_kernel(|kernel, at| {
            let whole = Frame::tcp((at.client, 20_000), (at.node, 30_080)).bytes();
            let mut versions = vec![0x05, 0x85];
            if at.pod.contains('.') {
                versions.extend([0x44, 0x65]);
            } else {
                versions.extend([0x40, 0x70]);
            }
            for version in versions {
                let mut bytes = whole.clone();
                bytes[14] = version;
                for hook in ["tc_from_pod", "tc_from_underlay", "tc_from_overlay"] {
                    kernel.drops_for(hook, &bytes, DropReason::Malformed);
                }
            }
        });
    }

    /// Where header and transport of a whole packet lie, what sum the transport has and where.
    fn shape(bytes: &[u8]) -> Option<(usize, Vec<u8>, usize)> {
        let v4 = bytes.get(12..14)? == [8, 0];
        let (l4, proto) = if v4 {
            let whole =
                *bytes.get(14)? == 0x45 && bytes.get(20)? & 0x3f == 0 && *bytes.get(21)? == 0;
            (whole.then_some(34)?, *bytes.get(23)?)
        } else {
            ((*bytes.get(14)? >> 4 == 6).then_some(54)?, *bytes.get(20)?)
        };
        let length = bytes.len().checked_sub(l4)?;
        let at = match proto {
            6 => 16,
            17 => 6,
            1 if v4 => 2,
            58 if !v4 => 2,
            _ => return None,
        };
        let mut pseudo = match (v4, proto) {
            (_, 1) => Vec::new(),
            (true, _) => bytes[26..34].to_vec(),
            (false, _) => bytes[22..54].to_vec(),
        };
        if proto != 1 {
            pseudo.extend([0, proto]);
            pseudo.extend(u16::try_from(length).ok()?.to_be_bytes());
        }
        (length >= at + 2).then_some((l4, pseudo, l4 + at))
    }

    /// Gives a changed packet the checksums that it should have.
    fn mend(bytes: &mut [u8]) {
        let Some((l4, pseudo, at)) = shape(bytes) else { return };
        bytes[at..at + 2].fill(0);
        let sum = checksum(&[&pseudo[..], &bytes[l4..]].concat());
        let sum = if sum == 0 { 0xffff } else { sum };
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        if bytes[12..14] == [8, 0] {
            bytes[24..26].fill(0);
            let sum = checksum(&bytes[14..34]);
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
    }

    /// Whether all checksums are right; `None` where that cannot be told.
    fn is_sound(bytes: &[u8]) -> Option<bool> {
        let (l4, pseudo, at) = shape(bytes)?;
        if bytes[12..14] == [8, 0] {
            if checksum(&bytes[14..34]) != 0 {
                return Some(false);
            }
            if bytes[23] == 17 && bytes[at..at + 2] == [0, 0] {
                return Some(true);
            }
        }
        Some(checksum(&[&pseudo[..], &bytes[l4..]].concat()) == 0)
    }

    fn storm(kernel: &mut Kernel, at: Family, runs: usize) {
        serve(kernel, at);
        let (seeds, least) = (packets(at), least(at));
        let before: u64 = kernel.drops().iter().sum();
        let mut random = Random(0x6f72_6c6f_7021);
        let (mut dropped, mut sent, mut judged) = (0_u64, 0_u64, 0);
        for _ in 0..runs {
            let mut bytes = seeds[random.below(seeds.len())].clone();
            for _ in 0..random.below(4) {
                let at = 14 + random.below(bytes.len() - 14);
                bytes[at] = u8::try_from(random.below(256)).unwrap();
            }
            if random.below(8) == 0 {
                bytes.truncate(least + random.below(bytes.len() - least));
            }
            mend(&mut bytes);
            kernel.came_by = u32::from(random.below(2) == 0);
            let hook = TcHook::ALL[random.below(TcHook::ALL.len())].program();
            let (verdict, out) = kernel.run(hook, &bytes);
            assert!([PASS, DROP, REDIRECT].contains(&verdict), "{hook} {verdict}");
            dropped += u64::from(verdict == DROP);
            sent += u64::from(verdict == REDIRECT);
            if verdict != DROP && is_sound(&bytes) == Some(true) {
                judged += 1;
                let words = || format!("{hook} {} -> {}", hex(&bytes), hex(&out));
                assert_ne!(is_sound(&out), Some(false), "{}", words());
            }
        }
        let counted = kernel.drops().iter().sum::<u64>() - before;
        // What is refused with an answer is counted and sent; what is refused without, for want of
        // budget, is counted twice.
        assert!(counted >= dropped && counted <= 2 * dropped + sent, "{counted} {dropped} {sent}");
        assert!(judged > runs / 20 && dropped > 0, "{judged} judged, {dropped} dropped");
    }

    #[test]
    fn a_hundred_thousand_random_packets_do_no_harm() {
        with_kernel(|kernel, at| storm(kernel, at, 50_000));
    }

    #[test]
    #[ignore = "takes minutes"]
    fn a_million_random_packets_do_no_harm() {
        with_kernel(|kernel, at| storm(kernel, at, 500_000));
    }
}
