//! Valid packets at every hook, of services and flows of every kind: what tests make worse.

use crate::{
    frame::{ACK, FIN, Frame, RST, SCTP, SYN, TCP, UDP},
    kernel::{Family, Kernel, any},
};

/// Bytes of Ethernet's and IP's headers: the kernel lets no test run have less.
pub(crate) fn least(at: Family) -> usize {
    if at.pod.contains('.') { 34 } else { 54 }
}

pub(crate) fn serve(kernel: &mut Kernel, at: Family) {
    for proto in [TCP, UDP, SCTP] {
        let port = if proto == SCTP { 80 } else { 8080 };
        kernel.serve(proto, (at.service, 80), &[(at.pod2, port), (at.far_pod, port)]);
        kernel.serve(proto, (at.service, 81), &[]);
        kernel.serve(proto, (any(at.node), 30_080), &[(at.pod, 30_080)]);
        kernel.serve(proto, (at.external, 80), &[(at.node, 80), (at.other_node, 80)]);
    }
}

/// Packets of every protocol, most of them of flows that earlier ones have opened.
pub(crate) fn packets(at: Family) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for proto in [TCP, UDP, SCTP] {
        for (from, to) in [
            ((at.pod, 40_000), (at.service, 80)),
            ((at.pod, 40_000), (at.service, 81)),
            ((at.pod, 40_000), (at.client, 80)),
            ((at.pod, 40_000), (at.pod2, 80)),
            ((at.client, 20_000), (at.node, 30_080)),
            ((at.client, 20_000), (at.external, 80)),
            ((at.far_pod, 20_000), (at.pod, 80)),
            ((at.gateway, 20_000), (at.service, 80)),
            ((at.node, 40_000), (at.client, 80)),
        ] {
            let frame = Frame::new(proto, from, to);
            frames.extend([frame.clone(), frame.answer()]);
            if proto == TCP {
                let flags = [ACK, FIN | ACK, RST, SYN | FIN];
                frames.extend(flags.map(|flags| Frame { flags, ..frame.clone() }));
            }
        }
    }
    let ping = Frame::ping((at.pod, 7), at.client);
    frames.extend([ping.answer(), ping, Frame::ping((at.client, 7), at.pod)]);
    for index in 0..frames.len() {
        let frame = frames[index].clone();
        let error = Frame::error(at.router, &frame, 28 + index);
        // Errors about errors are never answered, and quote what has no ports.
        frames.push(Frame::error(at.router, &error, 500));
        frames.push(error);
        let fragment = [(0, 16, true), (16, 64, false), (8, 8, true)][index % 3];
        frames.push(Frame { fragment: Some(fragment), ..frame.clone() });
        if at.pod.contains(':') {
            frames.push(Frame { extensions: vec![0, 43, 60], ..frame.clone() });
            frames.push(Frame { extensions: vec![60; 6], ..frame });
        }
    }
    frames.iter().map(Frame::bytes).collect()
}
