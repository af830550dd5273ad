//! Lines of container logs in the CRI format, and which of them a reader wants. Pure.

use jiff::Timestamp;

/// What `logs` was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::kubelet) struct Wanted {
    pub(in crate::kubelet) timestamps: bool,
    pub(in crate::kubelet) since: Option<Timestamp>,
    pub(in crate::kubelet) limit_bytes: Option<u64>,
}

/// One line of the file: `<time> <stream> <P|F> <text>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kubelet) struct Line<'a> {
    pub(in crate::kubelet) time: &'a str,
    /// The text goes on in the next line of the file.
    pub(in crate::kubelet) partial: bool,
    pub(in crate::kubelet) text: &'a [u8],
}

/// Reads a line without its line end; `None` if it has another form.
pub(in crate::kubelet) fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let _stream = parts.next()?;
    let tag = parts.next()?;
    Some(Line { time, partial: tag.first() == Some(&b'P'), text: parts.next().unwrap_or_default() })
}

/// Turns lines of the file into what the reader gets.
#[derive(Clone, Debug)]
pub(in crate::kubelet) struct Renderer {
    wanted: Wanted,
    /// The last line was partial: this one continues it.
    inside: bool,
    left: Option<u64>,
}

impl Renderer {
    pub(in crate::kubelet) fn new(wanted: Wanted) -> Self {
        Self { left: wanted.limit_bytes, wanted, inside: false }
    }

    /// The bytes for one line of the file; empty when it is not wanted.
    pub(in crate::kubelet) fn render(&mut self, line: &[u8]) -> Vec<u8> {
        let Some(line) = parse(line) else { return Vec::new() };
        let begins = !std::mem::replace(&mut self.inside, line.partial);
        let late = self
            .wanted
            .since
            .is_none_or(|since| line.time.parse::<Timestamp>().is_ok_and(|time| time >= since));
        if !late {
            return Vec::new();
        }
        let mut out = Vec::with_capacity(line.text.len() + 40);
        if self.wanted.timestamps && begins {
            out.extend_from_slice(line.time.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(line.text);
        if !line.partial {
            out.push(b'\n');
        }
        if let Some(left) = &mut self.left {
            out.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= u64::try_from(out.len()).unwrap_or(*left).min(*left);
        }
        out
    }

    /// Whether the limit is reached.
    pub(in crate::kubelet) const fn is_full(&self) -> bool {
        matches!(self.left, Some(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: [&str; 3] = [
        "2026-01-01T00:00:00.000000001Z stdout P half ",
        "2026-01-01T00:00:00.000000002Z stdout F line",
        "2026-01-01T00:00:01Z stderr F two  words",
    ];

    fn render(wanted: Wanted) -> String {
        let mut renderer = Renderer::new(wanted);
        let bytes: Vec<u8> =
            LINES.iter().flat_map(|line| renderer.render(line.as_bytes())).collect();
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn partial_lines_are_joined_and_times_stand_at_beginnings() {
        assert_eq!(render(Wanted::default()), "half line\ntwo  words\n");
        assert_eq!(
            render(Wanted { timestamps: true, ..Wanted::default() }),
            "2026-01-01T00:00:00.000000001Z half line\n2026-01-01T00:00:01Z two  words\n"
        );
    }

    #[test]
    fn older_lines_and_bytes_over_the_limit_are_left_out() {
        let since = "2026-01-01T00:00:01Z".parse().ok();
        assert_eq!(render(Wanted { since, ..Wanted::default() }), "two  words\n");
        assert_eq!(render(Wanted { limit_bytes: Some(12), ..Wanted::default() }), "half line\ntw");
    }
}
