//! The `RuntimeDefault` seccomp profile: which system calls a container may make, as a BPF program. Pure.
//!
//! An allow list after Docker's and containerd's default profile (`contrib/seccomp/seccomp_default.go`):
//! what is not named fails with EPERM, `clone3` with ENOSYS so that libraries fall back to `clone`, whose
//! flags a filter can see. The numbers are sorted into ranges and looked up by bisection, so that a call
//! costs about ten instructions however long the list is.

use super::seccomp_calls::ALLOWED;

/// `AUDIT_ARCH_*` of this machine (`include/uapi/linux/audit.h`).
#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

/// Numbers from here on are the x32 ABI's on x86-64 (`__X32_SYSCALL_BIT`); no call of aarch64 is as high.
const FOREIGN: u32 = 0x4000_0000;

/// Namespace flags of `clone`: a container without CAP_SYS_ADMIN cannot use them anyway, but a new user
/// namespace would give it that capability.
const NAMESPACES: u32 = 0x7e02_0000;

/// Socket family `AF_VSOCK`, a way out of a VM's network policy.
const AF_VSOCK: u32 = 40;

/// `personality` values that are allowed: Linux, its 32-bit `uname` variants, and the query.
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

/// Return values (`include/uapi/linux/seccomp.h`).
const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
const EPERM: u32 = 0x0005_0000 | 1;
const ENOSYS: u32 = 0x0005_0000 | 38;

/// Instruction codes (`include/uapi/linux/bpf_common.h`).
const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// The filter, an instruction a word as `shim::wire` has it.
#[must_use]
pub(super) fn default_filter() -> Vec<u64> {
    let mut program = vec![
        op(LOAD, 0, 0, ARCHITECTURE),
        op(JUMP_EQUAL, 1, 0, ARCH),
        op(RETURN, 0, 0, KILL),
        op(LOAD, 0, 0, NUMBER),
        op(JUMP_GREATER_EQUAL, 0, 1, FOREIGN),
        op(RETURN, 0, 0, EPERM),
    ];
    let special = |number: i64, body: Vec<u64>, program: &mut Vec<u64>| {
        let skip = u8::try_from(body.len()).unwrap_or(u8::MAX);
        program.push(op(JUMP_EQUAL, 0, skip, call(number)));
        program.extend(body);
    };
    special(libc::SYS_clone3, vec![op(RETURN, 0, 0, ENOSYS)], &mut program);
    let argument = |test: u64| {
        vec![op(LOAD, 0, 0, FIRST_ARGUMENT), test, op(RETURN, 0, 0, EPERM), op(RETURN, 0, 0, ALLOW)]
    };
    special(libc::SYS_clone, argument(op(JUMP_ANY_BIT, 0, 1, NAMESPACES)), &mut program);
    special(libc::SYS_socket, argument(op(JUMP_EQUAL, 0, 1, AF_VSOCK)), &mut program);
    let mut personality = vec![op(LOAD, 0, 0, FIRST_ARGUMENT)];
    for value in PERSONALITIES {
        personality.extend([op(JUMP_EQUAL, 0, 1, value), op(RETURN, 0, 0, ALLOW)]);
    }
    personality.push(op(RETURN, 0, 0, EPERM));
    special(libc::SYS_personality, personality, &mut program);
    program.extend(bisect(&boundaries()));
    program
}

/// Code in the lowest 16 bits, then `jt`, `jf`, `k`.
fn op(code: u16, jump_true: u8, jump_false: u8, k: u32) -> u64 {
    u64::from(code) | u64::from(jump_true) << 16 | u64::from(jump_false) << 24 | u64::from(k) << 32
}

/// System call numbers are small and positive.
fn call(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Where the verdict changes, in order: from this number on, what it is.
fn boundaries() -> Vec<(u32, u32)> {
    let mut numbers: Vec<u32> = ALLOWED.iter().map(|number| call(*number)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut changes = vec![(0, EPERM)];
    for number in numbers {
        match changes.last() {
            // It follows the range before it: that range's end moves on.
            Some(&(end, EPERM)) if end == number => {
                changes.pop();
                if changes.is_empty() {
                    changes.push((0, ALLOW));
                }
            }
            _ => changes.push((number, ALLOW)),
        }
        changes.push((number + 1, EPERM));
    }
    changes
}

/// A tree of comparisons over the boundaries; each half is laid out after its comparison. Its jumps stay
/// below 256 instructions as long as there are fewer than 128 ranges, which a test watches.
fn bisect(changes: &[(u32, u32)]) -> Vec<u64> {
    let [(_, verdict)] = changes else {
        let (low, high) = changes.split_at(changes.len() / 2);
        let Some((start, _)) = high.first() else { return Vec::new() };
        let (low, high) = (bisect(low), bisect(high));
        let over = u8::try_from(low.len()).unwrap_or(u8::MAX);
        let mut program = vec![op(JUMP_GREATER_EQUAL, over, 0, *start)];
        program.extend(low);
        program.extend(high);
        return program;
    };
    vec![op(RETURN, 0, 0, *verdict)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would, counting steps.
    fn run(program: &[u64], arch: u32, number: u32, argument: u32) -> (u32, usize) {
        let (mut at, mut value) = (0, 0);
        for steps in 1.. {
            let word: u64 = program[at];
            let [c0, c1, jt, jf, k @ ..] = word.to_le_bytes();
            let (code, k) = (u16::from_le_bytes([c0, c1]), u32::from_le_bytes(k));
            let jump = |taken: bool| usize::from(if taken { jt } else { jf });
            at += 1;
            match code {
                LOAD => {
                    value = match k {
                        NUMBER => number,
                        ARCHITECTURE => arch,
                        _ => argument,
                    }
                }
                JUMP_EQUAL => at += jump(value == k),
                JUMP_GREATER_EQUAL => at += jump(value >= k),
                JUMP_ANY_BIT => at += jump(value & k != 0),
                RETURN => return (k, steps),
                other => panic!("instruction {other:#x}"),
            }
        }
        unreachable!()
    }

    #[test]
    fn every_number_gets_its_verdict_in_few_steps() {
        let program = default_filter();
        assert!(program.len() < 512, "{} instructions", program.len());
        let special =
            [libc::SYS_clone, libc::SYS_clone3, libc::SYS_socket, libc::SYS_personality].map(call);
        for number in (0..600).filter(|number| !special.contains(number)) {
            let (verdict, steps) = run(&program, ARCH, number, 0);
            let allowed = ALLOWED.iter().any(|known| call(*known) == number);
            assert_eq!(verdict, if allowed { ALLOW } else { EPERM }, "call {number}");
            assert!(steps <= 20, "{steps} steps for {number}");
        }
    }

    #[test]
    fn escapes_are_closed() {
        let program = default_filter();
        let verdict = |number: i64, argument| run(&program, ARCH, call(number), argument).0;
        for refused in [
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_reboot,
            libc::SYS_keyctl,
            libc::SYS_kexec_load,
            libc::SYS_init_module,
            libc::SYS_pivot_root,
        ] {
            assert_eq!(verdict(refused, 0), EPERM, "call {refused}");
        }
        assert_eq!(verdict(libc::SYS_clone3, 0), ENOSYS);
        assert_eq!(verdict(libc::SYS_clone, 0x0001_2011), ALLOW);
        assert_eq!(verdict(libc::SYS_clone, 0x1000_0000), EPERM, "a user namespace");
        assert_eq!(verdict(libc::SYS_socket, 2), ALLOW);
        assert_eq!(verdict(libc::SYS_socket, AF_VSOCK), EPERM);
        assert_eq!(verdict(libc::SYS_personality, 8), ALLOW);
        assert_eq!(verdict(libc::SYS_personality, 0x0040_0000), EPERM);
        assert_eq!(run(&program, ARCH ^ 1, 0, 0).0, KILL);
        assert_eq!(run(&program, ARCH, FOREIGN, 0).0, EPERM);
    }
}
