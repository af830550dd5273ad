//! What the dataplane's task is asked about itself, and its answers.
//!
//! [`Reporter`] is for tasks that ask; the task answers between two rounds.

use std::{collections::BTreeMap, io, net::IpAddr};

use ebpf_common::endpoint::Endpoint;
use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot};

use super::{
    apply::Runner,
    listing::{Page, Wanted},
    status::Report,
};
use crate::model::FarEnd;

/// Questions that may wait for the task; the next one waits for room.
const QUESTIONS: usize = 8;

/// A question with the place for its answer.
#[derive(Debug)]
pub(super) enum Question {
    Report(oneshot::Sender<Report>),
    Services(Wanted, oneshot::Sender<Page>),
    Ends(oneshot::Sender<io::Result<Ends>>),
}

/// Where packets to pods are led, as it is programmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub pods: BTreeMap<IpAddr, Endpoint>,
    pub ranges: BTreeMap<IpNet, FarEnd>,
}

/// Asks the dataplane's task. Every answer is `None` once that has ended.
#[derive(Clone, Debug)]
pub struct Reporter(mpsc::Sender<Question>);

impl Reporter {
    pub(super) fn new() -> (Self, mpsc::Receiver<Question>) {
        let (questions, asked) = mpsc::channel(QUESTIONS);
        (Self(questions), asked)
    }

    /// What is programmed, by which paths, and what was dropped.
    pub async fn report(&self) -> Option<Report> {
        self.ask(Question::Report).await
    }

    /// One page of the frontends that are programmed.
    pub async fn services(&self, wanted: Wanted) -> Option<Page> {
        self.ask(|reply| Question::Services(wanted, reply)).await
    }

    /// Where packets to pods are led, or why that cannot be read.
    pub async fn ends(&self) -> Option<io::Result<Ends>> {
        self.ask(Question::Ends).await
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.0.send(question(reply)).await.ok()?;
        answer.await.ok()
    }
}

impl Runner {
    pub(super) fn answer(&self, question: Question) {
        // Whoever asked may have gone.
        match question {
            Question::Report(reply) => drop(reply.send(self.report())),
            Question::Services(wanted, reply) => {
                drop(reply.send(self.services.page(&wanted, &self.unserved.borrow())));
            }
            Question::Ends(reply) => drop(reply.send(self.ends())),
        }
    }

    fn ends(&self) -> io::Result<Ends> {
        Ok(Ends { pods: self.maps.endpoints()?, ranges: self.maps.tunnels()? })
    }
}
