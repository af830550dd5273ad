//! The host's way to run a command in a VM: a shell behind a port that QEMU forwards from loopback.
//! Used to hand over the join token and by tests; a real node has nothing like it.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// Stands before the exit code at the end of the shell's output.
const MARK: &str = "\norlop-exit-code:";

/// A VM's command port on loopback.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    pub(crate) port: u16,
}

/// What a command in a VM said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Stdout and stderr together.
    pub text: String,
    pub code: i32,
}

impl Guest {
    /// Runs `script` with `/bin/sh` as root; its stdin is empty.
    ///
    /// # Errors
    /// When the VM does not answer within `limit`. The script's own failure is `Said::code`.
    pub fn run(self, script: &str, limit: Duration) -> Result<Said> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))
            .with_context(|| format!("connect to the VM's command port {}", self.port))?;
        stream.set_read_timeout(Some(limit)).context("set a time limit")?;
        let request = format!(
            "( {script}\n) 2>&1 </dev/null; printf '{}%d\\n' $?; exit\n",
            MARK.replace('\n', "\\n")
        );
        stream.write_all(request.as_bytes()).context("send the command")?;
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        // The VM's end may already be gone.
        drop(stream.shutdown(Shutdown::Both));
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match parse(&text) {
            Some(said) => Ok(said),
            None => {
                read.with_context(|| format!("no answer from the VM to `{script}`"))?;
                bail!("the VM ended `{script}` without an exit code: {text}")
            }
        }
    }

    /// As `run`, for scripts that must succeed; returns what they said without the last line break.
    ///
    /// # Errors
    /// Also when the script ends with another code than 0.
    pub fn sh(self, script: &str) -> Result<String> {
        let said = self.run(script, Duration::from_secs(60))?;
        if said.code != 0 {
            bail!("in the VM, `{script}` ended with {}: {}", said.code, said.text);
        }
        Ok(said.text.trim_end().to_owned())
    }
}

fn parse(text: &str) -> Option<Said> {
    let (said, code) = text.rsplit_once(MARK)?;
    Some(Said { text: said.to_owned(), code: code.trim().parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_code_is_split_from_the_output() {
        let said = parse("a\nb\n\norlop-exit-code:3\n").unwrap();
        assert_eq!(said, Said { text: "a\nb\n".into(), code: 3 });
        assert_eq!(parse("cut off"), None);
    }
}
