//! The twin of the socket programs: `BPF_PROG_TEST_RUN` does not run those, so a trace puts a socket's
//! question into a packet and runs this, which asks the same function. Never attached to anything.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::{
    packet::ETH_LEN,
    socket::{Ask, LEFT, NO_QUESTION, REFUSED, TRANSLATED},
};

use crate::{count, socket};

#[classifier]
pub fn tc_trace_socket(ctx: TcContext) -> i32 {
    let Ok(ask) = ctx.load::<Ask>(ETH_LEN) else { return NO_QUESTION };
    match socket::decide(&ask) {
        Ok(None) => LEFT,
        Ok(Some(backend)) => {
            if ctx.store(ETH_LEN, &backend, 0).is_err() {
                NO_QUESTION
            } else {
                TRANSLATED
            }
        }
        Err(reason) => {
            let _verdict: i32 = count::drop(reason);
            REFUSED + reason as i32
        }
    }
}
