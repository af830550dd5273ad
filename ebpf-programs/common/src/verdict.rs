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
    BackendOnThisNode = 11, "node port backend in this node's own network";
    SourceRange = 12, "client is not in the service's source ranges";
}

/// Number of counters.
#[expect(clippy::cast_possible_truncation, reason = "there are a few dozen reasons")]
pub const DROP_REASONS: u32 = DropReason::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_numbered_without_a_gap_and_every_reason_has_words_of_its_own() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            let same = DropReason::ALL.iter().filter(|other| other.words() == reason.words());
            assert_eq!(same.count(), 1, "{}", reason.words());
        }
    }
}
