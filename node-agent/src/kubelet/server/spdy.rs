//! SPDY/3.1 frames as far as port-forward uses them. Pure: bytes in, frames out, and back.
//!
//! Header blocks of one direction share one zlib stream, primed with the draft's dictionary. Flow control is
//! not used: clients of port-forward neither send nor heed windows, the stream below slows both sides.

use bytes::{Buf as _, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Largest frame that is taken; clients send at most 32 KiB of data in one.
const MAX_FRAME_BYTES: usize = 1 << 20;
/// Largest header block once unpacked; clients send less than 200 bytes.
const MAX_HEADERS_BYTES: usize = 16 << 10;
const HEAD_BYTES: usize = 8;
const VERSION: u16 = 3;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// Status codes of `RST_STREAM` (draft 3, 2.6.3).
pub(super) const PROTOCOL_ERROR: u32 = 1;
pub(super) const REFUSED_STREAM: u32 = 3;

/// Words of the dictionary, each with its length in four bytes before it (draft 3, 2.6.10.1).
const DICTIONARY_WORDS: &str = "options head post put delete trace accept accept-charset \
    accept-encoding accept-language accept-ranges age allow authorization cache-control connection \
    content-base content-encoding content-language content-length content-location content-md5 \
    content-range content-type date etag expect expires from host if-match if-modified-since \
    if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer \
    transfer-encoding upgrade user-agent vary via warning www-authenticate method get status 200_OK \
    version HTTP/1.1 url public set-cookie keep-alive origin";
/// What follows the words.
const DICTIONARY_REST: &str = "100101201202205206300302303304305306307402405406407408409410411412\
    413414415416417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 \
    Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not \
    Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, \
    Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,\
    application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=\
    utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// Why a peer's bytes are no SPDY that is spoken here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SpdyError {
    #[error("SPDY version {0}")]
    Version(u16),
    #[error("SPDY frame of {0} bytes")]
    TooLarge(usize),
    #[error("SPDY frame cut short")]
    Short,
    #[error("SPDY header block")]
    Headers,
}

/// What a peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Header names are lower case.
    SynStream {
        id: u32,
        headers: Vec<(String, String)>,
        fin: bool,
    },
    Data {
        id: u32,
        bytes: Bytes,
        fin: bool,
    },
    Reset {
        id: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// One that asks for nothing: `SYN_REPLY`, `SETTINGS`, `HEADERS`, `WINDOW_UPDATE`, unknown ones.
    Other {
        kind: u16,
    },
}

/// The receiving side of a connection.
#[derive(Debug)]
pub(super) struct Decoder {
    buffer: BytesMut,
    inflate: Decompress,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { buffer: BytesMut::new(), inflate: Decompress::new(true) }
    }

    /// Takes bytes in, cut anywhere.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, SpdyError> {
        let Some(head) = self.buffer.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let [a, b, c, d, flags, length @ ..] = *head;
        let [x, y, z] = length.map(usize::from);
        let length = x << 16 | y << 8 | z;
        if length > MAX_FRAME_BYTES {
            return Err(SpdyError::TooLarge(length));
        }
        if self.buffer.len() < HEAD_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(HEAD_BYTES);
        let body = self.buffer.split_to(length).freeze();
        let fin = flags & FIN != 0;
        if a & 0x80 == 0 {
            let id = u32::from_be_bytes([a, b, c, d]);
            return Ok(Some(Frame::Data { id, bytes: body, fin }));
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        self.control(u16::from_be_bytes([c, d]), fin, body).map(Some)
    }

    fn control(&mut self, kind: u16, fin: bool, mut body: Bytes) -> Result<Frame, SpdyError> {
        let id = body.first_chunk().map(|bytes| u32::from_be_bytes(*bytes) & 0x7fff_ffff);
        let id = || id.ok_or(SpdyError::Short);
        match kind {
            SYN_STREAM => {
                let id = id()?;
                // The id, the stream it belongs to, priority and slot.
                let block = body.split_off(10.min(body.len()));
                Ok(Frame::SynStream { id, headers: self.headers(&block)?, fin })
            }
            SYN_REPLY | HEADERS => {
                // Unpacked for the sake of the blocks that follow it.
                self.headers(&body.split_off(4.min(body.len())))?;
                Ok(Frame::Other { kind })
            }
            RST_STREAM => Ok(Frame::Reset { id: id()? }),
            // Its number has 32 bits.
            PING => {
                body.try_get_u32().map(|id| Frame::Ping { id }).map_err(|_short| SpdyError::Short)
            }
            GOAWAY => Ok(Frame::GoAway),
            _ => Ok(Frame::Other { kind }),
        }
    }

    fn headers(&mut self, block: &[u8]) -> Result<Vec<(String, String)>, SpdyError> {
        let mut plain = Bytes::from(self.unpack(block)?);
        let count = plain.try_get_u32().map_err(|_short| SpdyError::Short)?;
        let mut headers = Vec::new();
        for _ in 0..count {
            let (name, value) = (text(&mut plain)?, text(&mut plain)?);
            headers.push((name, value));
        }
        Ok(headers)
    }

    fn unpack(&mut self, block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut plain = vec![0; MAX_HEADERS_BYTES];
        let (mut read, mut written) = (0, 0);
        loop {
            let input = block.get(read..).unwrap_or_default();
            let output = plain.get_mut(written..).unwrap_or_default();
            let before = (self.inflate.total_in(), self.inflate.total_out());
            let unpacked = self.inflate.decompress(input, output, FlushDecompress::Sync);
            let grown = |now: u64, then: u64| usize::try_from(now - then).unwrap_or(usize::MAX);
            let took = grown(self.inflate.total_in(), before.0);
            let gave = grown(self.inflate.total_out(), before.1);
            (read, written) = (read + took, written + gave);
            match unpacked {
                Err(error) if error.needs_dictionary().is_some() => {
                    let set = self.inflate.set_dictionary(&dictionary());
                    set.map_err(|_other_dictionary| SpdyError::Headers)?;
                }
                Err(_) | Ok(Status::StreamEnd) => return Err(SpdyError::Headers),
                Ok(_) if written == plain.len() => return Err(SpdyError::TooLarge(written)),
                Ok(_) if read == block.len() => break,
                Ok(_) if took == 0 && gave == 0 => return Err(SpdyError::Headers),
                Ok(_) => {}
            }
        }
        plain.truncate(written);
        Ok(plain)
    }
}

fn text(plain: &mut Bytes) -> Result<String, SpdyError> {
    let length = plain.try_get_u32().map_err(|_short| SpdyError::Short)?;
    let length = usize::try_from(length).map_err(|_huge| SpdyError::Short)?;
    if plain.len() < length {
        return Err(SpdyError::Short);
    }
    String::from_utf8(plain.split_to(length).to_vec()).map_err(|_no_text| SpdyError::Headers)
}

fn dictionary() -> Vec<u8> {
    let mut all = Vec::new();
    for word in DICTIONARY_WORDS.split_ascii_whitespace() {
        let length = u32::try_from(word.len()).unwrap_or_default();
        all.extend(length.to_be_bytes());
        all.extend(word.replace('_', " ").into_bytes());
    }
    all.extend(DICTIONARY_REST.bytes());
    all
}

/// The sending side's header blocks.
#[derive(Debug)]
pub(super) struct Encoder {
    deflate: Compress,
}

impl Encoder {
    /// # Errors
    /// None in practice: when zlib does not take the dictionary.
    pub(super) fn new() -> Result<Self, SpdyError> {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(&dictionary()).map_err(|_refused| SpdyError::Headers)?;
        Ok(Self { deflate })
    }

    /// Accepts a stream, without headers.
    pub(super) fn syn_reply(&mut self, id: u32) -> Result<Bytes, SpdyError> {
        let block = self.pack(&[])?;
        Ok(control(SYN_REPLY, &[&id.to_be_bytes(), &block]))
    }

    fn pack(&mut self, headers: &[(&str, &str)]) -> Result<Vec<u8>, SpdyError> {
        let number = |count: usize| u32::try_from(count).unwrap_or_default().to_be_bytes();
        let mut plain = number(headers.len()).to_vec();
        for (name, value) in headers {
            for text in [name, value] {
                plain.extend(number(text.len()));
                plain.extend(text.bytes());
            }
        }
        // Room for a block that does not shrink, the zlib head and the flush's marker.
        let mut block = Vec::with_capacity(plain.len() * 2 + 64);
        let packed = self.deflate.compress_vec(&plain, &mut block, FlushCompress::Sync);
        packed.map_err(|_refused| SpdyError::Headers)?;
        Ok(block)
    }
}

/// A frame of data; `bytes` must be shorter than 16 MiB.
pub(super) fn data(id: u32, bytes: &[u8]) -> Bytes {
    frame((id & 0x7fff_ffff).to_be_bytes(), 0, &[bytes])
}

/// The end of what we send on a stream.
pub(super) fn fin(id: u32) -> Bytes {
    frame((id & 0x7fff_ffff).to_be_bytes(), FIN, &[])
}

pub(super) fn reset(id: u32, status: u32) -> Bytes {
    control(RST_STREAM, &[&id.to_be_bytes(), &status.to_be_bytes()])
}

/// The answer to a ping.
pub(super) fn ping(id: u32) -> Bytes {
    control(PING, &[&id.to_be_bytes()])
}

fn control(kind: u16, parts: &[&[u8]]) -> Bytes {
    let ([a, b], [c, d]) = ((VERSION | 0x8000).to_be_bytes(), kind.to_be_bytes());
    frame([a, b, c, d], 0, parts)
}

fn frame(head: [u8; 4], flags: u8, parts: &[&[u8]]) -> Bytes {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let [_, length @ ..] = u32::try_from(length).unwrap_or_default().to_be_bytes();
    let mut out = Vec::with_capacity(HEAD_BYTES + parts.len());
    out.extend(head);
    out.push(flags);
    out.extend(length);
    for part in parts {
        out.extend_from_slice(part);
    }
    Bytes::from(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The dictionary's identity as every zlib stream names it.
    #[test]
    fn dictionary_is_the_drafts() {
        let mut inflate = Decompress::new(true);
        let mut encoder = Encoder::new().unwrap();
        let block = encoder.pack(&[]).unwrap();
        let error = inflate.decompress(&block, &mut [0; 16], FlushDecompress::Sync).unwrap_err();
        assert_eq!(error.needs_dictionary(), Some(0xe3c6_a7c2));
    }

    fn syn_stream(encoder: &mut Encoder, id: u32, headers: &[(&str, &str)]) -> Bytes {
        let block = encoder.pack(headers).unwrap();
        control(SYN_STREAM, &[&id.to_be_bytes(), &[0; 6], &block])
    }

    #[test]
    fn frames_are_read_however_their_bytes_are_cut() {
        let mut encoder = Encoder::new().unwrap();
        let headers = [("streamtype", "data"), ("port", "80"), ("requestid", "0")];
        let bytes = [
            syn_stream(&mut encoder, 1, &headers),
            encoder.syn_reply(2).unwrap(),
            syn_stream(&mut encoder, 3, &headers),
            data(3, b"hello"),
            fin(3),
            ping(7),
            reset(1, REFUSED_STREAM),
        ]
        .concat();
        let owned = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        for step in [1, 3, bytes.len()] {
            let mut decoder = Decoder::new();
            let mut frames = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.push(piece);
                while let Some(frame) = decoder.next().unwrap() {
                    frames.push(frame);
                }
            }
            let hello = Bytes::from_static(b"hello");
            let expected = [
                Frame::SynStream { id: 1, headers: owned(&headers), fin: false },
                Frame::Other { kind: SYN_REPLY },
                Frame::SynStream { id: 3, headers: owned(&headers), fin: false },
                Frame::Data { id: 3, bytes: hello, fin: false },
                Frame::Data { id: 3, bytes: Bytes::new(), fin: true },
                Frame::Ping { id: 7 },
                Frame::Reset { id: 1 },
            ];
            assert_eq!(frames, expected, "in pieces of {step}");
        }
    }

    #[test]
    fn what_is_too_large_or_cut_short_is_refused() {
        let mut huge = Encoder::new().unwrap();
        let value = "x".repeat(MAX_HEADERS_BYTES);
        let table = [
            (vec![0, 0, 0, 1, 0, 0xff, 0xff, 0xff], SpdyError::TooLarge(0xff_ffff)),
            (vec![0x80, 2, 0, 6, 0, 0, 0, 0], SpdyError::Version(2)),
            (control(PING, &[&[1, 2]]).to_vec(), SpdyError::Short),
            (control(SYN_STREAM, &[&[0, 0, 0, 1]]).to_vec(), SpdyError::Short),
            (
                syn_stream(&mut huge, 1, &[("a", &value)]).to_vec(),
                SpdyError::TooLarge(MAX_HEADERS_BYTES),
            ),
            (control(SYN_STREAM, &[&[0; 10], b"no zlib"]).to_vec(), SpdyError::Headers),
        ];
        for (bytes, expected) in table {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            assert_eq!(decoder.next(), Err(expected), "{bytes:?}");
        }
    }
}
