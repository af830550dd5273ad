//! What a kernel will count of an object's functions: instructions, and the stack of the longest chain of calls.
//!
//! Pure. A kernel refuses a program whose chain takes more than [`STACK`]; newer ones give some programs a stack
//! apart (`bpf_prog_priv_stack_mode`, kernel/bpf/verifier.c, 6.13), so that only old ones would tell.

use std::collections::{BTreeMap, BTreeSet};

/// `MAX_BPF_STACK` (include/linux/filter.h).
pub(crate) const STACK: u64 = 512;
/// What a frame takes is rounded up to this, and an empty one takes as much
/// (`check_max_stack_depth`, kernel/bpf/verifier.c, up to 6.12).
const FRAME: u64 = 32;

/// A function of the object that is a program or is called by one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) section: String,
    /// eBPF instructions of 8 bytes before relocation; called functions are counted apart.
    pub(crate) instructions: u64,
    /// Whether functions call it.
    pub(crate) is_called: bool,
    /// The longest chain of calls from here, this function first, and the stack that it takes in bytes.
    pub(crate) chain: (u64, Vec<String>),
}

/// One section header of an ELF file.
struct Section {
    name: u64,
    kind: u64,
    flags: u64,
    offset: u64,
    size: u64,
    link: u64,
    info: u64,
}

/// Where a function lies: its section's number, and its first byte there.
type Place = (u64, u64);

/// What is read of a function by itself.
struct Code {
    name: String,
    section: String,
    size: u64,
    depth: u64,
    calls: BTreeSet<Place>,
}

/// Functions in executable sections, by section and name. `None` when the ELF structure is broken.
pub(crate) fn functions(elf: &[u8]) -> Option<Vec<Function>> {
    const EXECUTABLE: u64 = 4;
    const FUNCTION: u64 = 2;
    (elf.get(..6)? == b"\x7fELF\x02\x01").then_some(())?;
    let table = number(elf, 40, 8)?;
    let count = number(elf, 60, 2)?;
    let sections: Vec<Section> =
        (0..count).map(|index| section(elf, table + index * 64)).collect::<Option<_>>()?;
    let names = at(&sections, number(elf, 62, 2)?)?;
    let symbols = symbols(elf, &sections)?;
    let relocations = relocations(elf, &sections, &symbols)?;
    let mut codes = BTreeMap::new();
    for symbol in &symbols {
        let Some(home) = at(&sections, symbol.place.0) else { continue };
        if symbol.kind != FUNCTION || home.flags & EXECUTABLE == 0 {
            continue;
        }
        let (depth, calls) = read(elf, home.offset, symbol, &relocations)?;
        let section = text(elf, names.offset + home.name)?;
        let name = symbol.name.clone();
        codes.insert(symbol.place, Code { name, section, size: symbol.size, depth, calls });
    }
    let called: BTreeSet<Place> = codes.values().flat_map(|code| code.calls.clone()).collect();
    let function = |(place, code): (&Place, &Code)| Function {
        name: code.name.clone(),
        section: code.section.clone(),
        instructions: code.size / 8,
        is_called: called.contains(place),
        chain: chain(&codes, *place, codes.len()),
    };
    let mut found: Vec<_> = codes.iter().map(function).collect();
    found.sort_by(|a, b| (&a.section, &a.name).cmp(&(&b.section, &b.name)));
    Some(found)
}

/// The longest chain from a function, of at most so many: one that calls itself is the verifier's to refuse.
fn chain(codes: &BTreeMap<Place, Code>, place: Place, most: usize) -> (u64, Vec<String>) {
    let Some(code) = codes.get(&place).filter(|_| most > 0) else { return (0, Vec::new()) };
    let below = code.calls.iter().map(|called| chain(codes, *called, most - 1)).max();
    let (stack, names) = below.unwrap_or_default();
    let own = code.depth.max(1).next_multiple_of(FRAME);
    (own + stack, [vec![code.name.clone()], names].concat())
}

struct Symbol {
    name: String,
    kind: u64,
    place: Place,
    size: u64,
}

fn symbols(elf: &[u8], sections: &[Section]) -> Option<Vec<Symbol>> {
    const SYMBOL_TABLE: u64 = 2;
    let table = sections.iter().find(|section| section.kind == SYMBOL_TABLE)?;
    let strings = at(sections, table.link)?;
    let symbol = |entry: u64| {
        Some(Symbol {
            name: text(elf, strings.offset + number(elf, entry, 4)?)?,
            kind: number(elf, entry + 4, 1)? & 0xf,
            place: (number(elf, entry + 6, 2)?, number(elf, entry + 8, 8)?),
            size: number(elf, entry + 16, 8)?,
        })
    };
    entries(table, 24).map(symbol).collect()
}

/// Of each place with a relocation, where its symbol lies.
fn relocations(
    elf: &[u8],
    sections: &[Section],
    symbols: &[Symbol],
) -> Option<BTreeMap<Place, Place>> {
    const RELOCATIONS: u64 = 9;
    let mut found = BTreeMap::new();
    for table in sections.iter().filter(|section| section.kind == RELOCATIONS) {
        for entry in entries(table, 16) {
            let symbol = at(symbols, number(elf, entry + 12, 4)?)?;
            found.insert((table.info, number(elf, entry, 8)?), symbol.place);
        }
    }
    Some(found)
}

/// How deep a function reaches into its frame, and what it calls.
///
/// Instructions are read one after the other: places in the frame are spoken of by the frame pointer, or by a copy
/// of it to which a constant is added next.
fn read(
    elf: &[u8],
    section_at: u64,
    symbol: &Symbol,
    relocations: &BTreeMap<Place, Place>,
) -> Option<(u64, BTreeSet<Place>)> {
    const FRAME_POINTER: u64 = 10;
    const LOAD: u64 = 1;
    const STORES: [u64; 2] = [2, 3];
    const COPY: u64 = 0xbf;
    const ADD: u64 = 0x07;
    const CALL: u64 = 0x85;
    const OF_THE_OBJECT: u64 = 1;
    let (mut depth, mut calls, mut copy) = (0, BTreeSet::new(), None);
    let (section, first) = symbol.place;
    for place in (first..first + symbol.size).step_by(8) {
        let code = number(elf, section_at + place, 1)?;
        let registers = number(elf, section_at + place + 1, 1)?;
        let (to, from) = (registers & 0xf, registers >> 4);
        let offset = signed(number(elf, section_at + place + 2, 2)?, 16);
        let constant = signed(number(elf, section_at + place + 4, 4)?, 32);
        let is_access = code & 7 == LOAD && from == FRAME_POINTER
            || STORES.contains(&(code & 7)) && to == FRAME_POINTER;
        if is_access {
            depth = depth.max(below(offset));
        }
        if code == ADD && copy == Some(to) {
            depth = depth.max(below(constant));
        }
        copy = (code == COPY && from == FRAME_POINTER).then_some(to);
        if code == CALL && from == OF_THE_OBJECT {
            let after = |base: u64| base.checked_add_signed((constant + 1) * 8);
            calls.insert(match relocations.get(&(section, place)) {
                // A symbol of a whole section: the constant says where in it.
                Some((section, 0)) => (*section, after(0)?),
                Some(symbol) => *symbol,
                None => (section, after(place)?),
            });
        }
    }
    Some((depth, calls))
}

/// Bytes below the frame pointer.
const fn below(offset: i64) -> u64 {
    if offset < 0 { offset.unsigned_abs() } else { 0 }
}

/// A number of so many bits in two's complement.
const fn signed(number: u64, bits: u32) -> i64 {
    (number << (64 - bits)).cast_signed() >> (64 - bits)
}

fn section(elf: &[u8], at: u64) -> Option<Section> {
    Some(Section {
        name: number(elf, at, 4)?,
        kind: number(elf, at + 4, 4)?,
        flags: number(elf, at + 8, 8)?,
        offset: number(elf, at + 24, 8)?,
        size: number(elf, at + 32, 8)?,
        link: number(elf, at + 40, 4)?,
        info: number(elf, at + 44, 4)?,
    })
}

/// Where a section's entries of so many bytes begin.
fn entries(section: &Section, size: usize) -> impl Iterator<Item = u64> {
    (section.offset..section.offset.saturating_add(section.size)).step_by(size)
}

fn at<T>(items: &[T], index: u64) -> Option<&T> {
    items.get(usize::try_from(index).ok()?)
}

/// A little-endian number of `size` bytes.
fn number(bytes: &[u8], at: u64, size: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let field = bytes.get(at..at.checked_add(size)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn text(bytes: &[u8], at: u64) -> Option<String> {
    let from = bytes.get(usize::try_from(at).ok()?..)?;
    let end = from.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(from.get(..end)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_else_than_an_elf_file_has_no_functions() {
        assert_eq!(functions(b"not an object"), None);
        assert_eq!(functions(b"\x7fELF\x02\x01 cut off"), None);
    }

    #[test]
    fn numbers_are_little_endian_and_bounded_by_the_file() {
        assert_eq!(number(&[1, 2, 0, 0], 0, 4), Some(0x201));
        assert_eq!(number(&[1, 2], 1, 4), None);
        assert_eq!((signed(0xfff8, 16), signed(8, 16)), (-8, 8));
    }

    /// Instructions of a function at the start of the file, as section 1.
    fn read_all(code: &[[u8; 8]], relocations: &[(Place, Place)]) -> (u64, Vec<Place>) {
        let bytes = code.concat();
        let size = u64::try_from(bytes.len()).unwrap();
        let symbol = Symbol { name: "f".into(), kind: 2, place: (1, 0), size };
        let relocations = relocations.iter().copied().collect();
        let (depth, calls) = read(&bytes, 0, &symbol, &relocations).unwrap();
        (depth, calls.into_iter().collect())
    }

    #[test]
    fn loads_stores_and_addresses_reach_into_the_frame() {
        // *(u64 *)(r10 - 16) = r1; r2 = *(u32 *)(r10 - 24); *(u8 *)(r1 - 100) = r2
        let accesses = [
            [0x7b, 0x1a, 0xf0, 0xff, 0, 0, 0, 0],
            [0x61, 0xa2, 0xe8, 0xff, 0, 0, 0, 0],
            [0x73, 0x21, 0x9c, 0xff, 0, 0, 0, 0],
        ];
        assert_eq!(read_all(&accesses, &[]), (24, vec![]));
        // r3 = r10; r3 += -40; r4 += -80
        let address = [
            [0xbf, 0xa3, 0, 0, 0, 0, 0, 0],
            [0x07, 0x03, 0, 0, 0xd8, 0xff, 0xff, 0xff],
            [0x07, 0x04, 0, 0, 0xb0, 0xff, 0xff, 0xff],
        ];
        assert_eq!(read_all(&address, &[]), (40, vec![]));
    }

    #[test]
    fn calls_lead_on_within_a_section_and_to_another_one() {
        // Two calls two instructions on, one of a helper.
        let call = [0x85, 0x10, 0, 0, 1, 0, 0, 0];
        let code = [call, call, call, [0x85, 0, 0, 0, 5, 0, 0, 0]];
        let far = [((1, 8), (7, 0)), ((1, 16), (8, 24))];
        assert_eq!(read_all(&code, &far).1, [(1, 16), (7, 16), (8, 24)]);
    }

    #[test]
    fn the_chain_that_takes_most_is_found_and_frames_are_rounded_up() {
        let code = |name: &str, depth, calls: &[Place]| Code {
            name: name.into(),
            section: ".text".into(),
            size: 8,
            depth,
            calls: calls.iter().copied().collect(),
        };
        let codes = BTreeMap::from([
            ((0, 0), code("main", 200, &[(1, 0), (1, 8)])),
            ((1, 0), code("deep", 33, &[])),
            ((1, 8), code("two", 0, &[(1, 16)])),
            ((1, 16), code("leaf", 32, &[])),
        ]);
        let names = |names: [&str; 3]| names.map(str::to_owned).to_vec();
        assert_eq!(chain(&codes, (0, 0), 4), (288, names(["main", "two", "leaf"])));
        // Nothing more than what calls itself is followed for ever.
        let again = BTreeMap::from([((0, 0), code("again", 8, &[(0, 0)]))]);
        assert_eq!(chain(&again, (0, 0), 1).0, 32);
    }
}
