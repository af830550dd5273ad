//! ICMP errors about packets of flows: outer and quoted packet are turned back.

#[cfg(test)]
mod tests {
    use ebpf_common::verdict::DropReason;

    use crate::{
        frame::{Frame, TCP, UDP},
        kernel::{REDIRECT, delivered, hop, masked, redirected, with_kernel},
    };

    /// Only the eight bytes of the transport that are promised, and all of the packet.
    const QUOTED: [usize; 3] = [28, 48, 500];

    #[test]
    fn a_router_tells_a_pod_about_its_masqueraded_packet() {
        with_kernel(|kernel, at| {
            for asked in [
                Frame::tcp((at.pod, 40_000), (at.client, 443)),
                Frame::udp((at.pod, 40_000), (at.client, 53)),
                Frame::ping((at.pod, 777), at.client),
                Frame::ping((at.pod2, 777), at.client),
            ] {
                let (_, out) = kernel.run("tc_from_pod", &asked.bytes());
                let ip = if asked.src.0.is_ipv4() { 20 } else { 40 };
                let offset = 14 + ip + if asked.flags == 2 || asked.flags == 0 { 0 } else { 4 };
                let port = u16::from_be_bytes([out[offset], out[offset + 1]]);
                let sent = masked(&asked, (at.node, port));
                for quoted in QUOTED.map(|quoted| quoted + ip - 20) {
                    for from in [at.router, at.client] {
                        let error = Frame::error(from, &sent, quoted);
                        let told = Frame::error(from, &asked, quoted);
                        let (verdict, out) = kernel.run("tc_from_underlay", &error.bytes());
                        let mut expect = delivered(&told);
                        if asked.src.0 == at.pod2.parse::<std::net::IpAddr>().unwrap() {
                            expect.dst_mac = crate::kernel::POD2_MAC;
                        }
                        assert_eq!(
                            (verdict, out),
                            (REDIRECT, expect.bytes()),
                            "{asked:?} {quoted}"
                        );
                    }
                }
            }
        });
    }

    #[test]
    fn errors_about_questions_and_answers_of_a_service_name_the_service() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP] {
                kernel.serve(proto, (at.service, 53), &[(at.far_pod, 5353)]);
                let asked = Frame::new(proto, (at.pod, 40_000), (at.service, 53));
                let sent = redirected(&asked, (at.far_pod, 5353));
                kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
                // The backend itself, and a router on the way.
                for (from, seen_from) in [(at.far_pod, at.service), (at.router, at.router)] {
                    let error = Frame::error(from, &sent, 500);
                    let told = Frame::error(seen_from, &asked, 500);
                    let seen = delivered(&told);
                    kernel.check("tc_from_overlay", &error, REDIRECT, Some(&seen));
                }
                // The client about what the service answered.
                let error = Frame::error(at.pod, &asked.answer(), 500);
                let told = hop(&Frame::error(at.pod, &sent.answer(), 500));
                kernel.check("tc_from_pod", &error, REDIRECT, Some(&told));
            }
        });
    }

    #[test]
    fn a_quoted_packet_may_have_extension_headers_and_be_a_fragment() {
        with_kernel(|kernel, at| {
            if at.pod.contains('.') {
                return;
            }
            for proto in [TCP, UDP] {
                kernel.serve(proto, (at.service, 53), &[(at.far_pod, 5353)]);
                let plain = Frame::new(proto, (at.pod, 40_000), (at.service, 53));
                let sent = redirected(&plain, (at.far_pod, 5353));
                kernel.check("tc_from_pod", &plain, REDIRECT, Some(&hop(&sent)));
                let first = Some((0, 24, true));
                for (extensions, fragment) in [
                    (vec![0], None),
                    (vec![0, 43, 60], None),
                    (vec![], first),
                    (vec![60, 43], first),
                ] {
                    let like = |frame: &Frame| Frame {
                        extensions: extensions.clone(),
                        fragment,
                        ..frame.clone()
                    };
                    for quoted in [48 + 8 * extensions.len() + 8, 500] {
                        let error = Frame::error(at.router, &like(&sent), quoted);
                        let told = delivered(&Frame::error(at.router, &like(&plain), quoted));
                        kernel.check("tc_from_overlay", &error, REDIRECT, Some(&told));
                    }
                }
                // A later one shows no ports.
                let later = Frame { fragment: Some((16, 100, false)), ..sent.clone() };
                let error = Frame::error(at.router, &later, 500);
                kernel.check("tc_from_overlay", &error, REDIRECT, Some(&delivered(&error)));
            }
        });
    }

    #[test]
    fn a_client_outside_tells_the_backend() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.external, 53), &[(at.far_pod, 5353)]);
            let asked = Frame::udp((at.client, 20_000), (at.external, 53));
            let sent = masked(&redirected(&asked, (at.far_pod, 5353)), (at.gateway, 20_000));
            kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&hop(&sent)));
            let error = Frame::error(at.client, &asked.answer(), 500);
            let told = hop(&Frame::error(at.gateway, &sent.answer(), 500));
            kernel.check("tc_from_underlay", &error, REDIRECT, Some(&told));
            // And the backend's side tells the client, in the name of the service.
            let error = Frame::error(at.far_pod, &sent, 500);
            let told = hop(&Frame::error(at.external, &asked, 500));
            kernel.check("tc_from_overlay", &error, REDIRECT, Some(&told));
        });
    }

    #[test]
    fn an_error_about_no_flow_goes_to_no_service() {
        with_kernel(|kernel, at| {
            let about = Frame::udp((at.service, 53), (at.pod, 40_000));
            let error = Frame::error(at.pod, &about, 500).bytes();
            kernel.drops_for("tc_from_pod", &error, DropReason::ServiceAddress);
        });
    }
}
