//! Why a packet or a connection was refused, in numbers for the kernel and words for people.

macro_rules! drop_reasons {
    ($($name:ident = $value:literal, $words:literal;)*) => {
        /// Why a packet was dropped or a connection refused. The value is its counter's index.
        ///
        /// As wide as a verdict, so that `Result<i32, DropReason>` is two registers of which both are
        /// always set: the verifier refuses programs in which the compiler shares an unset one.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropReason {
            $(#[doc = $words] $name = $value,)*
        }

        impl DropReason {
            /// Every reason, in the order of the counters.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The reason of a counter; of one that is none, [`Self::Malformed`].
            #[inline(always)]
            #[must_use]
            pub const fn of(index: u32) -> Self {
                match index {
                    $($value => Self::$name,)*
                    _ => Self::Malformed,
                }
            }

            /// Whether nobody answers where somebody could: the client is told so.
            #[must_use]
            pub const fn is_refusal(self) -> bool {
                matches!(self, Self::NoBackend | Self::UnknownService)
            }

            /// The reason in words.
            #[must_use]
            pub const fn words(self) -> &'static str {
                match self {
                    $(Self::$name => $words,)*
                }
            }
        }
    };
}

drop_reasons! {
    NoBackend = 0, "service has no ready endpoint";
    UnknownService = 1, "address in the service range that no service has";
    BackendMissing = 2, "backend row missing for a chosen slot";
    Malformed = 3, "packet too short or with a bad header length";
    OwnFrame = 4, "own broadcast frame came back";
    NoTunnel = 5, "no node is known for the destination";
    TunnelKey = 6, "kernel refused the tunnel key";
    ConntrackFull = 7, "connection table full";
    PortsExhausted = 8, "no free source port towards the backend";
    Rewrite = 9, "kernel refused to rewrite the packet";
    NoRoute = 10, "no route to the destination";
    SourceRange = 11, "client is not in the service's source ranges";
    NoFlow = 12, "packet of a connection that is not known";
    FragmentLost = 13, "fragment before the first one of its packet";
    SctpPort = 14, "SCTP service with a target port that is not its own port";
    Extensions = 15, "more IPv6 extension headers than are followed";
    RefusalLimit = 16, "refused without an answer, more than the answers allowed per second";
    ServiceAddress = 17, "protocol without ports to a service address";
    TooBig = 18, "packet larger than its way out takes";
    NoLocalBackend = 19, "service has ready endpoints on other nodes alone";
}

/// How many answers a CPU may send in a second to tell of refusals: enough for every client that
/// means it, too few to be used against somebody whose address is forged (kube-proxy's rely on the
/// kernel's own limit, which is 1,000 a second for the whole node: `icmp_msgs_per_sec`).
pub const REFUSALS_PER_SECOND: u32 = 1_000;

/// What a CPU has sent of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Second of the monotonic clock.
    pub second: u32,
    /// Answers sent in it.
    pub sent: u32,
}
const _: () = assert!(size_of::<Budget>() == 8);

impl Budget {
    /// Takes one answer out of the budget of the second `now`; whether there was one left.
    #[inline(always)]
    pub const fn take(&mut self, now: u32) -> bool {
        if self.second != now {
            *self = Self { second: now, sent: 0 };
        }
        if self.sent >= REFUSALS_PER_SECOND {
            return false;
        }
        self.sent += 1;
        true
    }
}

/// Number of counters.
#[expect(clippy::cast_possible_truncation, reason = "there are a few dozen reasons")]
pub const DROP_REASONS: u32 = DropReason::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_its_budget_and_the_next_one_anew() {
        let mut budget = Budget::default();
        for now in [7, 8] {
            for _ in 0..REFUSALS_PER_SECOND {
                assert!(budget.take(now));
            }
            assert!(!budget.take(now));
        }
    }

    #[test]
    fn counters_are_numbered_without_a_gap_and_every_reason_has_words_of_its_own() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(DropReason::of(*reason as u32), *reason);
            let same = DropReason::ALL.iter().filter(|other| other.words() == reason.words());
            assert_eq!(same.count(), 1, "{}", reason.words());
        }
    }
}
