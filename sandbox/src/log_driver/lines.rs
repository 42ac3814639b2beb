//! Cuts a stream of bytes into lines, as docker does: at line ends, and where a line is too long after
//! [`MAX_LINE_BYTES`].

/// Longest piece of a line that is kept as one entry.
pub(crate) const MAX_LINE_BYTES: usize = 16 * 1024;

/// The unfinished line of one stream.
#[derive(Debug, Default)]
pub(crate) struct LineBuffer {
    partial: Vec<u8>,
}

impl LineBuffer {
    /// Gives every piece that is whole to `take`: a line with its end, or a part of a long one without.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut take: impl FnMut(&[u8])) {
        while !bytes.is_empty() {
            let room = MAX_LINE_BYTES - self.partial.len();
            let window = &bytes[..bytes.len().min(room)];
            let (piece, whole) = match memchr::memchr(b'\n', window) {
                Some(end) => (&window[..=end], true),
                None => (window, window.len() == room),
            };
            bytes = &bytes[piece.len()..];
            if !whole {
                self.partial.extend_from_slice(piece);
            } else if self.partial.is_empty() {
                take(piece);
            } else {
                self.partial.extend_from_slice(piece);
                take(&self.partial);
                // Its memory goes too: most containers print whole lines.
                self.partial = Vec::new();
            }
        }
    }

    /// Gives the rest, at the end of the stream.
    pub(crate) fn finish(&mut self, take: impl FnOnce(&[u8])) {
        if !self.partial.is_empty() {
            take(&std::mem::take(&mut self.partial));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut buffer = LineBuffer::default();
        let mut pieces = Vec::new();
        for chunk in chunks {
            buffer.push(chunk, |piece| pieces.push(piece.to_vec()));
        }
        buffer.finish(|piece| pieces.push(piece.to_vec()));
        pieces
    }

    #[test]
    fn line_in_parts_is_one_piece_and_the_last_needs_no_end() {
        assert_eq!(pieces(&[b"a", b"b\ncd\n", b"e"]), [&b"ab\n"[..], b"cd\n", b"e"]);
        assert_eq!(pieces(&[b"\n\n"]), [b"\n", b"\n"]);
        assert!(pieces(&[b""]).is_empty());
    }

    #[test]
    fn long_line_is_cut_after_sixteen_kibibytes() {
        let long = vec![b'x'; MAX_LINE_BYTES + 5];
        let cut = pieces(&[&long, b"\n"]);
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_LINE_BYTES, 6]);
        // As long as the buffer with its end: docker gives the end an entry of its own.
        let exact = pieces(&[&long[..MAX_LINE_BYTES], b"\n"]);
        assert_eq!(
            exact.iter().map(Vec::len).collect::<Vec<_>>(),
            [MAX_LINE_BYTES, 1]
        );
    }

    proptest::proptest! {
        #[test]
        fn no_byte_is_lost_and_no_piece_is_too_long(
            chunks in proptest::collection::vec(proptest::collection::vec(8_u8..14, 0..9000), 0..8),
        ) {
            let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let cut = pieces(&chunks);
            proptest::prop_assert!(cut.iter().all(|piece| piece.len() <= MAX_LINE_BYTES));
            proptest::prop_assert_eq!(cut.concat(), chunks.concat());
        }
    }
}
