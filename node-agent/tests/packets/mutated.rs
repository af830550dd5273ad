//! Valid packets made wrong on purpose: cut at every length, with lies in every length field, in chains of
//! extension headers and in packets that errors quote.
//!
//! What a program may do with them is said without its parser: it drops and counts the packet, or leaves it,
//! or changes addresses, ports and checksums where they are, as a row of the connection table says, and not a
//! byte beside. A checksum that was wrong stays as wrong as it was (RFC 1624).

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ebpf_common::{addr::Addr, conntrack::FlowKey};
    use node_agent::dataplane::load::TcHook;

    use crate::{
        chance::Random,
        frame::{ICMP, ICMPV6},
        kernel::{DROP, Family, Kernel, PASS, REDIRECT, hex, with_kernel},
        made::{least, packets, serve},
        reading::{Packet, read, residual},
        runs,
    };

    fn byte(random: &mut Random) -> u8 {
        u8::try_from(random.below(256)).unwrap()
    }

    /// Puts a lie into a packet.
    fn lie(bytes: &mut [u8], random: &mut Random) {
        let v4 = bytes[12..14] == [8, 0];
        let l4 = if v4 { 34 } else { 54 };
        let lengths = [0, 1, 7, 8, 19, 20, 28, 40, bytes.len() - 15, bytes.len() - 13, 0xffff];
        let length = u16::try_from(lengths[random.below(lengths.len())]).unwrap().to_be_bytes();
        let any = 14 + random.below(bytes.len() - 14);
        let mut put = |at: usize, new: &[u8]| {
            if let Some(there) = bytes.get_mut(at..at + new.len()) {
                there.copy_from_slice(new);
            }
        };
        match random.below(10) {
            // Total or payload length; UDP's length, or what lies at its place.
            0 => put(if v4 { 16 } else { 18 }, &length),
            1 => put(l4 + 4, &length),
            // The length of IPv4's header and the version; the length of TCP's header.
            2 => put(14, &[byte(random)]),
            3 if v4 => put(14, &[0x40 | byte(random) & 0x0f]),
            3 | 4 => put(l4 + 12, &[byte(random)]),
            // Protocol or next header; length of an extension; fragments.
            5 => put(
                if v4 { 23 } else { 20 },
                &[[0, 1, 6, 17, 43, 44, 58, 60, 132][random.below(9)]],
            ),
            6 => put(
                l4 + 8 * random.below(4),
                &[[0, 43, 44, 60, 6, 17][random.below(6)], byte(random)],
            ),
            7 if v4 => put(20, &[byte(random), byte(random)]),
            7 => put(l4 + 2, &[byte(random), byte(random)]),
            // What an error quotes: its version, its protocol.
            8 => put(l4 + 8, &[byte(random)]),
            9 => put(l4 + 8 + if v4 { 9 } else { 6 }, &[byte(random)]),
            _ => put(any, &[byte(random)]),
        }
    }

    /// Checks one run; says whether the packet was translated.
    fn check(kernel: &mut Kernel, hook: &str, bytes: &[u8]) -> bool {
        let (verdict, out) = kernel.run(hook, bytes);
        let words = || format!("{hook} verdict {verdict}\n{} ->\n{}", hex(bytes), hex(&out));
        assert!([PASS, DROP, REDIRECT].contains(&verdict), "{}", words());
        if verdict == DROP || out == bytes {
            return false;
        }
        let Some(packet) = read(bytes) else {
            // Nothing can be said of it: at most its hops and MACs are changed.
            let mut hop = out.clone();
            hop[..12].copy_from_slice(&bytes[..12]);
            assert_eq!(hex(&hop), hex(bytes), "{}", words());
            return false;
        };
        if is_refusal(&packet, &out) {
            let answer = read(&out).expect("an answer of ours is well made");
            let wrong = answer.parts.iter().map(|part| residual(part, &out)).max();
            assert_eq!(wrong, Some(0), "{}", words());
            return false;
        }
        assert_eq!(out.len(), bytes.len(), "{}", words());
        let changed: BTreeSet<usize> =
            (12..out.len()).filter(|at| out[*at] != bytes[*at]).collect();
        let allowed = packet.changeable();
        assert!(changed.is_subset(&allowed), "{changed:?} beside {allowed:?}: {}", words());
        for part in &packet.parts {
            assert_eq!(residual(part, bytes), residual(part, &out), "{part:?}: {}", words());
        }
        let is_translated = !changed.is_subset(&packet.hops());
        if is_translated {
            let after = read(&out).expect("a translated packet is read as before");
            assert!(rows(kernel, &packet).contains(&after.ends), "no such flow: {}", words());
        }
        is_translated
    }

    /// Port unreachable, sent back to who asked.
    fn is_refusal(packet: &Packet, out: &[u8]) -> bool {
        let Some(answer) = read(out) else { return false };
        let kind = out.get(answer.l4..answer.l4 + 2);
        let turned = (answer.ends.0.0, answer.ends.1.0) == (packet.ends.1.0, packet.ends.0.0);
        turned && [Some(&[3, 3][..]), Some(&[1, 4])].contains(&kind) && packet.proto != answer.proto
    }

    type Ends = ((Addr, u16), (Addr, u16));

    /// What the connection table makes of a packet; of an error, what it makes of an answer to the quoted.
    fn rows(kernel: &Kernel, packet: &Packet) -> Vec<Ends> {
        let (proto, ((src, sport), (dst, dport))) = match &packet.quoted {
            None => (packet.proto, packet.flow),
            Some(quoted) => (quoted.proto, (quoted.ends.1, quoted.ends.0)),
        };
        if packet.is_later {
            // Its ports are those of its first fragment, whichever that was.
            let same = |key: &FlowKey| (key.proto, key.src, key.dst) == (proto, src, dst);
            let flows = kernel.flows().into_iter().filter(|(key, _)| same(key));
            return flows.map(|(_, flow)| ((flow.src, 0), (flow.dst, 0))).collect();
        }
        let (sport, dport) = (sport.to_be_bytes(), dport.to_be_bytes());
        let key = FlowKey { src, dst, sport, dport, proto, reserved: [0; 3] };
        let Some(flow) = kernel.flow(&key) else { return Vec::new() };
        let port = |port: [u8; 2]| u16::from_be_bytes(port);
        let ends = ((flow.src, port(flow.sport)), (flow.dst, port(flow.dport)));
        if packet.quoted.is_none() && matches!(proto, ICMP | ICMPV6) && sport == dport {
            // An identifier of zero does not tell an answer from a question.
            let turned = ((ends.0.0, ends.1.1), (ends.1.0, ends.0.1));
            return vec![ends, turned];
        }
        vec![match &packet.quoted {
            None => ends,
            // The far end's name, or the router's own.
            Some(quoted) if packet.ends.0.0 == quoted.ends.1.0 => ((flow.src, 0), (flow.dst, 0)),
            Some(_) => ((packet.ends.0.0, 0), (flow.dst, 0)),
        }]
    }

    fn mutate(kernel: &mut Kernel, at: Family, runs: usize) {
        serve(kernel, at);
        let seeds = packets(at);
        let least = least(at);
        let before: u64 = kernel.drops().iter().sum();
        let mut random = Random(0x6f72_6c6f_7021 ^ runs::seed());
        let mut translated = 0;
        for _ in 0..runs {
            let mut bytes = seeds[random.below(seeds.len())].clone();
            for _ in 0..random.below(4) {
                lie(&mut bytes, &mut random);
            }
            if random.below(4) == 0 {
                bytes.truncate(least + random.below(bytes.len() - least));
            }
            kernel.came_by = u32::from(random.below(3) == 0);
            let hook = TcHook::ALL[random.below(TcHook::ALL.len())].program();
            translated += usize::from(check(kernel, hook, &bytes));
        }
        let dropped = kernel.drops().iter().sum::<u64>() - before;
        assert!(
            translated > runs / 50 && dropped > 0,
            "{translated} translated, {dropped} dropped"
        );
    }

    #[test]
    fn packets_with_lies_in_them_are_dropped_or_handled_as_what_they_are() {
        let runs = runs::cases(100_000);
        with_kernel(|kernel, at| mutate(kernel, at, runs / 2));
    }

    #[test]
    fn packets_are_cut_at_every_length_at_every_hook() {
        with_kernel(|kernel, at| {
            serve(kernel, at);
            let least = least(at);
            // On an emulated processor each hook has every fourth length, another one than the hook before it.
            let step = if runs::is_emulated() { 4 } else { 1 };
            for whole in packets(at) {
                for (number, hook) in TcHook::ALL.map(TcHook::program).into_iter().enumerate() {
                    for length in (least..whole.len()).rev().skip(number % step).step_by(step) {
                        check(kernel, hook, &whole[..length]);
                    }
                }
            }
        });
    }
}
