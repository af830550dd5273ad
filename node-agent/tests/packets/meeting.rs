//! Traffic that nothing translates and that has the ports of a flow towards the same backend.

#[cfg(test)]
mod tests {
    use crate::{
        frame::{Frame, UDP},
        kernel::{REDIRECT, delivered, delivered2, redirected, with_kernel},
    };

    #[test]
    fn an_answer_to_what_was_sent_directly_is_taken_for_the_flows() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.service, 53), &[(at.pod2, 5353)]);
            let asked = Frame::udp((at.pod, 40_000), (at.service, 53));
            let sent = redirected(&asked, (at.pod2, 5353));
            kernel.check("tc_from_pod", &asked, REDIRECT, Some(&delivered2(&sent)));
            // Another socket has the port now, and sends to the backend itself, or to another service that
            // a program at the socket has translated to it.
            kernel.check("tc_from_pod", &sent, REDIRECT, Some(&delivered2(&sent)));
            // FIXME(issue 3): it must come from the backend. The kernel's own connection tracking would have
            // given the second one another port.
            let seen = delivered(&asked.answer());
            kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));
        });
    }
}
