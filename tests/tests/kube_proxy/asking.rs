//! Many questions at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::node::{Node, ROLE, itself, said_to};

/// Of two answers one is missed once in a million times.
const TRIES: usize = 20;
/// Longest for one answer. What nobody answers is not asked again.
const PATIENCE: Duration = Duration::from_millis(1_500);
const AT_ONCE: usize = 8;

/// One end that is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    /// The service, and by what: `web by node port, UDP`.
    pub(crate) about: String,
    pub(crate) is_udp: bool,
    pub(crate) to: SocketAddr,
}

/// By question who answers; "nobody" whatever the reason is.
pub(crate) type Answers = BTreeMap<String, BTreeSet<String>>;

/// What processes of the node hear, and what a client outside does.
pub(crate) fn ask_all(node: &Node, questions: &[Question]) -> Answers {
    let folder = node.folder.path();
    fs::write(folder.join("questions.json"), serde_json::to_string(questions).unwrap()).unwrap();
    let itself = itself("ask", folder);
    let mut command = node.within(Path::new(itself.get_program()), &[]);
    command.args(itself.get_args()).env(ROLE, format!("ask {}", folder.display()));
    said_to(&mut command, &folder.join("ask.log"));
    assert!(node.spawn(command).wait().unwrap().success(), "asked in the node");
    let answers = fs::read_to_string(folder.join("answers.json")).unwrap();
    let inside: Answers = serde_json::from_str(&answers).unwrap();
    let questions = questions.to_vec();
    let outside = node.outside.run(move || heard(&questions));
    let named = |who: &'static str, answers: Answers| {
        answers.into_iter().map(move |(about, answers)| (format!("{who} asks {about}"), answers))
    };
    named("the node", inside).chain(named("a client outside", outside)).collect()
}

/// The part of the process that asks in the node.
pub(crate) fn play(folder: &Path) {
    let questions = fs::read_to_string(folder.join("questions.json")).unwrap();
    let answers = heard(&serde_json::from_str::<Vec<Question>>(&questions).unwrap());
    fs::write(folder.join("answers.json"), serde_json::to_string(&answers).unwrap()).unwrap();
}

fn heard(questions: &[Question]) -> Answers {
    let each = questions.len().div_ceil(AT_ONCE).max(1);
    thread::scope(|scope| {
        let threads: Vec<_> = questions
            .chunks(each)
            .map(|some| {
                scope.spawn(|| {
                    some.iter().map(|one| (one.about.clone(), ask(one))).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn ask(question: &Question) -> BTreeSet<String> {
    let mut answers = BTreeSet::new();
    for _ in 0..TRIES {
        let answer = if question.is_udp { by_udp(question.to) } else { by_tcp(question.to) };
        let Ok(answer) = answer else {
            answers.insert("nobody".to_owned());
            break;
        };
        answers.insert(answer);
    }
    answers
}

fn by_tcp(to: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn by_udp(to: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    let mut bytes = [0; 64];
    let count = socket.recv(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}
