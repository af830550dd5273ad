//! The eBPF object that `build.rs` made, carried inside the agent.

/// The object's bytes. The ELF reader wants them 8-byte aligned.
#[must_use]
pub fn object() -> &'static [u8] {
    static OBJECT: Aligned<[u8; include_bytes!(env!("ORLOP_EBPF_OBJECT")).len()]> =
        Aligned(*include_bytes!(env!("ORLOP_EBPF_OBJECT")));
    &OBJECT.0
}

#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_is_an_aligned_elf_file_for_bpf() {
        let object = object();
        assert_eq!(object.as_ptr().addr() % 8, 0);
        assert_eq!(&object[..4], b"\x7fELF");
        assert_eq!(object[18..20], [247, 0], "e_machine is EM_BPF");
    }
}
