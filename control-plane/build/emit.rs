//! Writes the table in the form that `schema::table` reads in place: fixed rows and one string pool.

use std::{collections::BTreeMap, io::Write as _};

use flate2::{Compression, write::ZlibEncoder};

use super::{
    Failure,
    join::{Field, Table},
    proto::Container,
};

/// Strings with a 16-bit length in front, each stored once.
#[derive(Default)]
struct Pool {
    bytes: Vec<u8>,
    known: BTreeMap<String, u32>,
}

impl Pool {
    fn put(&mut self, text: &str) -> Result<u32, Failure> {
        if let Some(at) = self.known.get(text) {
            return Ok(*at);
        }
        let at = u32::try_from(self.bytes.len())?;
        self.bytes.extend(u16::try_from(text.len())?.to_le_bytes());
        self.bytes.extend(text.as_bytes());
        self.known.insert(text.to_owned(), at);
        Ok(at)
    }
}

/// Layout, all little-endian: five `u32` (types, fields, kinds, bytes of strings, bytes of the
/// inflated docs), type rows of 16 bytes, field rows of 24, kind rows of 16, strings.
pub(super) fn emit(table: &Table) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let mut strings = Pool::default();
    let mut docs = Pool::default();
    docs.put("")?;
    strings.put("")?;
    let (mut types, mut fields, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
    let mut count = 0_u32;
    for kind in &table.types {
        let name = strings.put(&kind.name)?;
        types.extend(name.to_le_bytes());
        types.extend(docs.put(&kind.doc)?.to_le_bytes());
        types.extend(u16::try_from(count)?.to_le_bytes());
        types.extend(u16::try_from(kind.fields.len())?.to_le_bytes());
        types.extend(u32::from(kind.atomic).to_le_bytes());
        for field in &kind.fields {
            put_field(field, &mut fields, &mut strings, &mut docs)?;
            count += 1;
        }
    }
    for ([group, version, kind], index) in &table.kinds {
        for text in [group, version, kind] {
            kinds.extend(strings.put(text)?.to_le_bytes());
        }
        kinds.extend(u32::from(*index).to_le_bytes());
    }
    let mut out = Vec::new();
    let lengths =
        [table.types.len(), usize::try_from(count)?, table.kinds.len(), strings.bytes.len()];
    for length in lengths.into_iter().chain([docs.bytes.len()]) {
        out.extend(u32::try_from(length)?.to_le_bytes());
    }
    for part in [types, fields, kinds, strings.bytes] {
        out.extend(part);
    }
    let mut deflate = ZlibEncoder::new(Vec::new(), Compression::best());
    deflate.write_all(&docs.bytes)?;
    Ok((out, deflate.finish()?))
}

fn put_field(
    field: &Field,
    rows: &mut Vec<u8>,
    strings: &mut Pool,
    docs: &mut Pool,
) -> Result<(), Failure> {
    let markers = &field.markers;
    let keys: Vec<&str> = markers.all("listMapKey").collect();
    let strategy = markers.get("patchStrategy").unwrap_or_default();
    let list = match markers.get("listType") {
        Some("set") => 1,
        Some("map") => 2,
        _ => 0,
    };
    let atomic =
        markers.get("mapType") == Some("atomic") || markers.get("structType") == Some("atomic");
    let mut flags = list << 3;
    let bits = [
        (field.required, 0),
        (field.inline, 1),
        (field.pointer, 2),
        (strategy.split(',').any(|s| s == "merge"), 5),
        (strategy.split(',').any(|s| s == "replace"), 6),
        (strategy.split(',').any(|s| s == "retainKeys"), 7),
        (atomic, 8),
    ];
    for (set, bit) in bits {
        flags |= u16::from(set) << bit;
    }
    rows.extend(strings.put(&field.name)?.to_le_bytes());
    rows.extend(docs.put(&field.doc)?.to_le_bytes());
    rows.extend(strings.put(&keys.join(","))?.to_le_bytes());
    rows.extend(strings.put(markers.get("patchMergeKey").unwrap_or_default())?.to_le_bytes());
    rows.extend(field.tag.to_le_bytes());
    rows.extend(field.message.to_le_bytes());
    rows.push(field.element);
    rows.push(match field.container {
        Container::One => 0,
        Container::List => 1,
        Container::Map => 2,
    });
    rows.extend(flags.to_le_bytes());
    Ok(())
}
