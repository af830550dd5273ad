//! An error with its causes, in one line. Pure.

/// The error with all its causes, for logs and for messages that people read: `a: b: c`. A cause that the words before
/// have said already is left out: many a library's error repeats what is below it (`kube::Error` does so three times).
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Words(&'static str, #[source] Option<Box<Self>>);

    #[test]
    fn causes_follow_and_what_was_said_is_not_repeated() {
        let cause = |words, cause| Some(Box::new(Words(words, cause)));
        let plain = Words("read a", cause("open b", cause("no such file", None)));
        assert_eq!(chain(&plain), "read a: open b: no such file");
        let said = Words("list: refused: 403", cause("refused: 403", cause("403", None)));
        assert_eq!(chain(&said), "list: refused: 403");
    }
}
