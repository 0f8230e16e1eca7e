// Package dir reads the wishes of a cluster from a file or a folder of
// Kubernetes manifests, follows their changes, and writes such folders.
//
// It takes YAML and JSON, many documents in a file, List and typed lists such as
// ServiceList, and of them the kinds Namespace, Pod, Deployment, StatefulSet,
// DaemonSet, ReplicaSet, Job, Service, EndpointSlice and Node, and of ConfigMaps
// kube-system/coredns and kube-system/ip-masq-agent, decoded with Kubernetes' own types. Objects of other kinds are passed over and counted. It
// is not for talking to an API server, and it writes nothing in the kernel.
//
// # Folders
//
// A folder is read with all folders below it: every *.yaml, *.yml and *.json
// whose name does not start with a dot. Links are followed, so that a mounted
// ConfigMap works. A path that is one file may have any name.
//
// # Nothing is lost by a typo
//
// A document that cannot be read is reported with its file, line, object and
// field. As long as a file has one, the objects that the file held before and
// does not show now stay in force; so does everything when a file cannot be read
// at all or the path itself is gone. A field that Kubernetes does not know
// (`prots:`) is reported and passed over; the object is used without it. An
// object that is in two files is taken from the first by path, and the other is
// reported.
//
// # Nor by a restart
//
// A new process does not know what a file said before it was broken. What is
// unread counts in model.Snapshot.Unread, so that nothing is removed because of
// it, until it is mended or its file is gone:
//
//   - Each part of a file that is reported as not readable: a document that is no
//     YAML, JSON or UTF-8, one that is no object, has no kind, apiVersion or
//     usable name, has a field of the wrong type, or has an apiVersion that is no
//     longer served; a list of no items or inside a list; what is over a limit.
//     JSON after an error of syntax, and documents over MaxObjects, count once.
//   - A file that cannot be read at all: no permission, larger than MaxFile, a
//     link that leads nowhere, a pipe or device with the name of a manifest.
//   - A folder that cannot be listed, and a path that is gone before the first
//     look at it.
//   - An object with faults, as package cluster counts it.
//
// The first two do not count for a file of which everything could be read since
// it appeared, the third not for a folder that was read: what they said is known
// and in force. A file that is put under another name is another file.
//
// Not unread are unknown and doubled fields, an object that is there twice, kinds
// that are not read (a misspelt kind is one), links of no manifest's name that
// lead nowhere, and folders whose changes go unnoticed.
//
// # Watching
//
// Changes come from inotify: a file is read when its writer closes it, renames
// it into place, links it or removes it, and no other file is read again. A lost
// event (queue overflow) or a change of folders has the folders walked again, and
// what changed in them is read then.
//
// A file that is being written is not read, neither for an event nor by a walk:
// from when the kernel tells that it was created, emptied or written to until it
// tells that one who writes to it has closed it, or that its name was moved or
// removed. What the file said before stays in force; a file that said nothing yet
// counts as unread. If nobody closes it, it is read 5 s after the last write. So
// half a file is read only where the kernel cannot tell: it was begun before its
// folder was watched (the first look at a path or at a new folder) and nothing
// was written since, it has several writers, its writer pauses for 5 s, writes
// through mmap or closes it after each piece, it is renamed before it is whole,
// its events were lost, or it is emptied and filled again during the read itself.
// An empty file that nobody is writing is one that says nothing.
//
// It is inotify and not a portable library because only inotify's close event
// tells a finished file from a truncated one.
//
// # Costs and limits
//
// BenchmarkEventToSnapshot, a small JSON file put into a folder of a thousand, on
// two busy cores of an AMD EPYC: 0.28 ms from the Put of Writer to the delivered
// Snapshot on a tmpfs, of which writing takes 0.1 ms; 1.2 to 1.7 ms on a disk,
// where writing takes nearly all. Changes that arrive while one is worked on go
// into one Snapshot together. A changed file is decoded whole: give objects that
// change often files of their own, and prefer JSON: 10,000 Services with an
// EndpointSlice each take 1.1 s to decode, as YAML 3.7 s.
//
// 30,000 Services with an EndpointSlice of four endpoints each keep 43 MB, the
// Snapshot included (TestLiveHeap, which allows 45); package cluster says of what.
// While a file is read, it is in memory once, and once more where it holds several
// JSON documents; YAML takes several times as much.
//
// Files are limited to MaxFile, single objects to MaxObject, one YAML document to
// MaxYAML, and what YAML aliases add to a MiB a document.
package dir
