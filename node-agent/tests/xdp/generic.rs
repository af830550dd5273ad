//! The program for the kernel's stack: where it does less than the driver's.

#[cfg(test)]
mod tests {
    use crate::{
        driver::{Family, MAC, NEXT_MAC, REDIRECT, asked, question, with_kernel},
        wire::{SYN, TCP, UDP, Wire, checksum},
    };

    /// A frame whose sender leaves the checksum to a device: it holds the sum of the pseudo header.
    fn unfinished(family: Family, wire: &Wire) -> Vec<u8> {
        let mut bytes = wire.bytes();
        let (ends, transport) = if family.node.contains(':') { (22, 54) } else { (26, 34) };
        let length = u16::try_from(bytes.len() - transport).unwrap().to_be_bytes();
        let pseudo = [&bytes[ends..transport], &[0, wire.proto], &length].concat();
        let at = transport + if wire.proto == TCP { 16 } else { 6 };
        bytes[at..at + 2].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
        bytes
    }

    #[test]
    fn what_goes_on_to_another_node_is_carried_once_its_checksum_is_whole() {
        with_kernel(|kernel, family| {
            kernel.program = "xdp_generic";
            for (port, proto) in [(20_000, TCP), (20_001, UDP)] {
                kernel.open(family, proto, port, family.routed_pod);
                let question = question(family, proto, port);
                let asked =
                    Wire { macs: [NEXT_MAC, MAC], ..asked(family, &question, family.routed_pod) };
                kernel.check(&question.bytes(), REDIRECT, &asked.bytes());
                kernel.passes(&unfinished(family, &question));
                let flows = kernel.flows();
                let new = Wire { flags: SYN, src: (question.src.0, 20_009), ..question };
                kernel.passes(&unfinished(family, &new));
                assert_eq!(kernel.flows(), flows, "tc opens it");
            }
        });
    }

    #[test]
    fn what_is_for_a_pod_here_passes_untouched() {
        with_kernel(|kernel, family| {
            kernel.program = "xdp_generic";
            for (port, proto) in [(20_000, TCP), (20_001, UDP)] {
                kernel.open(family, proto, port, family.local_pod);
                kernel.passes(&question(family, proto, port).bytes());
            }
        });
    }
}
