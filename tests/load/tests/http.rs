//! What `load http` prints of a server on loopback, and how it is told to end.

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead as _, BufReader, Write as _},
        net::{Ipv4Addr, TcpListener},
        process::{Command, Stdio},
        thread,
    };

    /// Answers every request with `here`; the port.
    fn server() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(&stream).lines().map_while(Result::ok);
                assert!(lines.take_while(|line| !line.is_empty()).count() > 1);
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhere\n").unwrap();
            }
        });
        port
    }

    fn load(args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
        command.arg("http").args(args).stdout(Stdio::piped());
        command
    }

    #[test]
    fn line_tells_when_the_connection_began_and_what_was_answered() {
        let port = server().to_string();
        let out = load(&["--host", "127.0.0.1", "--port", &port, "--count", "2"]).output().unwrap();
        assert!(out.status.success());
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            assert!(number(0) > 1_600_000_000_000 && number(1) <= number(2), "{line}");
            assert_eq!(words[3..], ["ok", "here"], "{line}");
        }
    }

    #[test]
    fn file_that_comes_ends_a_load() {
        let port = server().to_string();
        let end = std::env::temp_dir().join(format!("orlop-load-{}", std::process::id()));
        let until = end.to_str().unwrap();
        let args = ["--host", "127.0.0.1", "--port", &port, "--pause-ms", "1", "--until", until];
        let mut child = load(&args).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..20 {
            let line = lines.next().unwrap().unwrap();
            assert!(line.ends_with(" ok here"), "{line}");
        }
        fs::write(&end, "").unwrap();
        // The pipe ends with the process; without an end this would go on for an hour.
        assert!(lines.map_while(Result::ok).all(|line| line.ends_with(" ok here")));
        assert!(child.wait().unwrap().success());
        fs::remove_file(&end).unwrap();
    }
}
