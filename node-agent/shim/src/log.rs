//! Container output into CRI log lines. [`Lines`] is pure; [`LogFile`] writes.
//!
//! Format: `<time> stdout|stderr P|F <data>`, `P` for a line that goes on in the next entry. As in
//! containerd, lines are cut at 16 KiB and a last line without a newline stays `P`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

/// Longest data of an entry (containerd's `max_container_log_line_size`).
const MAX_LINE_BYTES: usize = 16 << 10;

/// The unfinished line of one stream.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Takes what was read at `time` and appends the entries it completes to `out`.
    pub(crate) fn feed(&mut self, data: &[u8], head: &Head<'_>, out: &mut Vec<u8>) {
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            self.rest.extend_from_slice(text);
            while self.rest.len() > MAX_LINE_BYTES {
                let tail = self.rest.split_off(MAX_LINE_BYTES);
                head.entry(b'P', &self.rest, out);
                self.rest = tail;
            }
            if ended {
                head.entry(b'F', &self.rest, out);
                self.rest.clear();
            }
        }
        if self.rest.is_empty() {
            self.rest = Vec::new();
        }
    }

    /// The stream ended.
    pub(crate) fn finish(&mut self, head: &Head<'_>, out: &mut Vec<u8>) {
        if !self.rest.is_empty() {
            head.entry(b'P', &self.rest, out);
            self.rest = Vec::new();
        }
    }
}

/// What every entry of one read begins with.
#[derive(Debug)]
pub(crate) struct Head<'a> {
    pub(crate) time: String,
    /// `stdout` or `stderr`.
    pub(crate) stream: &'a str,
}

impl Head<'_> {
    fn entry(&self, tag: u8, data: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(self.time.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.stream.as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(data);
        out.push(b'\n');
    }
}

/// The file of one container. A disk that is full loses lines, never blocks the container.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// # Errors
    /// When the file cannot be made; its folder must exist.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        let file = Self::open_file(&path)?;
        Ok(Self { path, file })
    }

    fn open_file(path: &PathBuf) -> io::Result<File> {
        OpenOptions::new().append(true).create(true).mode(0o640).open(path)
    }

    /// Goes on in a new file under the same name, after a rotation renamed the old one.
    ///
    /// # Errors
    /// When it cannot be made; the old file stays in use.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        self.file = Self::open_file(&self.path)?;
        Ok(())
    }

    pub(crate) fn append(&mut self, entries: &[u8]) {
        // Nobody could be told but through the same full disk.
        drop(self.file.write_all(entries));
    }
}

/// RFC 3339 in UTC with nanoseconds, from nanoseconds since 1970.
pub(crate) fn rfc3339(at_ns: i64) -> String {
    let (seconds, nanos) = (at_ns.div_euclid(1_000_000_000), at_ns.rem_euclid(1_000_000_000));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// Gregorian date of a day counted from 1970-01-01: years are taken from March, so that the leap day
/// is a year's last, and 400 years always have 146,097 days.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(chunks: &[&[u8]]) -> Vec<String> {
        let head = Head { time: "T".to_owned(), stream: "stdout" };
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for chunk in chunks {
            lines.feed(chunk, &head, &mut out);
        }
        lines.finish(&head, &mut out);
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn lines_are_joined_over_reads_and_a_last_one_without_newline_is_partial() {
        assert_eq!(
            entries(&[b"a\nb", b"c\n\nd"]),
            ["T stdout F a", "T stdout F bc", "T stdout F ", "T stdout P d"]
        );
    }

    #[test]
    fn long_lines_are_cut_at_16_kib() {
        let mut data = vec![b'x'; MAX_LINE_BYTES + 1];
        data.push(b'\n');
        let found = entries(&[&data]);
        assert_eq!(found.len(), 2);
        assert_eq!(found.first().map(String::len), Some("T stdout P ".len() + MAX_LINE_BYTES));
        assert_eq!(found.last().map(String::as_str), Some("T stdout F x"));
        data.remove(0);
        assert_eq!(entries(&[&data]).len(), 1, "exactly 16 KiB is one entry");
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(rfc3339(1_795_202_281_123_456_789), "2026-11-20T19:18:01.123456789Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59.999999999Z");
    }
}
