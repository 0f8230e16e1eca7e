// Package layer says what every switchable part of millrace has in common: the
// verbs the agent calls, and Changes, the one value that a dry run prints, a
// log line says, a metric counts and Apply carries out.
//
// It writes nothing in the kernel and costs nothing; the layers do.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/millrace/millrace/model"
)

// Layer is something that can be switched on and off on a node. The agent calls
// its verbs from one goroutine.
type Layer interface {
	// Name is the layer's folder, its word in pins, metrics and commands.
	Name() string
	// Plan says what the kernel should hold for a Snapshot. It is pure: no
	// clock, no files, no root, and the order of the input does not matter.
	Plan(*model.Snapshot) Picture
	// Open loads what the layer needs into the kernel, or takes over what an
	// earlier process left there without a gap in traffic. It returns ErrInUse
	// while another process has the layer open at the same place.
	Open() error
	// Read says what the kernel holds now, and clears away what a writer that
	// died halfway left there. The layer must be open.
	Read() (Picture, error)
	// Refresh looks again at what others change all the time, such as devices
	// that come and go, and returns have, altered. It costs little.
	Refresh(have Picture) (Picture, error)
	// Watch calls changed when Refresh would find something else, until ctx
	// ends. A layer that depends on nothing of the kind waits for that.
	Watch(ctx context.Context, changed func()) error
	// Look says what the kernel holds now and changes nothing. The layer need
	// not be open, and another process may have it open.
	Look() (Picture, error)
	// Diff says what leads from one picture to another. With prune false
	// nothing is removed, and nothing stops working for want of a part: the input
	// is not known to be whole. It is pure.
	Diff(have, want Picture, prune bool) Changes
	// Apply carries out the changes from have to want, reads back what it wrote,
	// and returns the picture that is now in force, which may be have altered, and
	// the changes that succeeded. A change that fails does not stop the others;
	// the error joins them all.
	Apply(have, want Picture, changes Changes) (Picture, Changes, error)
	// Settle puts in force what an Open had to hold back, because it replaces
	// what an earlier process left and was empty. The agent calls it once a
	// complete Snapshot has been applied; calling it again does nothing.
	Settle() error
	// Describe says what the layer uses and what it has done.
	Describe() (Description, error)
	// Close lets go of the kernel's objects but leaves them in force.
	Close() error
	// Leave makes the layer begin nothing new, so that others can who serve beside
	// it; what is open goes on until Remove. Called again, it forgets what has ended
	// since. It returns what it did of Removal. Open takes it back. It returns
	// ErrInUse as Remove does.
	Leave() (Changes, error)
	// Left is how many connections are open that end with Remove.
	Left() (int, error)
	// Removal says what Remove would do now.
	Removal() (Changes, error)
	// Remove takes everything of the layer out of the kernel, whether or not
	// this process has opened it. Absent is success.
	Remove() (Changes, error)
}

// Server is a layer without whose objects Services cannot be relied on at a node.
type Server interface {
	// Serves says whether Services are in force, by a picture of the kernel.
	Serves(Picture) bool
}

// ErrInUse says that another process works at the same place.
var ErrInUse = errors.New("another millrace process works here: stop it first")

// Picture is the state of a layer: wanted, or read from the kernel. Only the
// layer that made it looks inside.
type Picture interface {
	// Len is the number of objects in it.
	Len() int
	// Subjects are its objects in order; each can be turned into JSON.
	Subjects() []Subject
}

// Op is what a Change does.
type Op byte

// The three things a Change can do, by the sign that is printed.
const (
	Add    Op = '+'
	Alter  Op = '~'
	Remove Op = '-'
)

// MarshalText gives the sign.
func (o Op) MarshalText() ([]byte, error) { return []byte{byte(o)}, nil }

// Subject is the object of a Change.
type Subject interface {
	// Object names it: "service 10.96.0.10:53/udp".
	Object() string
	// Detail says what it becomes: "-> 10.244.1.4:53, 10.244.2.9:53".
	Detail() string
}

// Change is one step from what is to what is wanted. Its text is made when it
// is printed, not before: a hundred thousand of them cost no text.
type Change struct {
	Op      Op
	Subject Subject
}

// String is the change in the operator's words,
// "+ service 10.96.0.10:53/udp -> 10.244.1.4:53".
func (c Change) String() string {
	return strings.TrimRight(fmt.Sprintf("%c %s %s", c.Op, c.Subject.Object(), c.Subject.Detail()), " ")
}

// Changes are in the order of their text.
type Changes []Change

// Print writes one line for each change.
func (c Changes) Print(w io.Writer) error {
	for _, change := range c {
		if _, err := fmt.Fprintln(w, change); err != nil {
			return err
		}
	}
	return nil
}

// Tally counts changes by what they do.
type Tally struct {
	Added   int `json:"added"`
	Altered int `json:"altered"`
	Removed int `json:"removed"`
}

// Tally counts the changes by what they do.
func (c Changes) Tally() Tally {
	var t Tally
	for _, change := range c {
		switch change.Op {
		case Add:
			t.Added++
		case Alter:
			t.Altered++
		case Remove:
			t.Removed++
		}
	}
	return t
}

// Description is what a layer says of itself for status and metrics.
type Description struct {
	Name    string `json:"name"`
	Objects int    `json:"objects"`
	Maps    []Map  `json:"maps"`
	// Settings are those in force, by the names of their flags.
	Settings map[string]string `json:"settings,omitempty"`
	// Values are settings of the kernel that the layer has set.
	Values []Value `json:"values,omitempty"`
	// Reasons counts what the programs did, by the names of `enum reason`.
	Reasons map[string]uint64 `json:"reasons"`
	// Programs are attached, by name.
	Programs []Program `json:"programs"`
	// Drops are the packets that died in each network namespace.
	Drops []Drops `json:"drops,omitempty"`
	// Flows are the TCP connections that have ended, by who spoke to whom.
	Flows []Flow `json:"-"`
	// Degraded are the kernel features that are missing, each with what that
	// means for the user.
	Degraded []string `json:"degraded,omitempty"`
}

// Map is the use of one kernel map.
type Map struct {
	Name     string `json:"name"`
	Entries  int    `json:"entries"`
	Capacity int    `json:"capacity"`
	Bytes    uint64 `json:"bytes"`
}

// Drops are packets that died in a network namespace of a reason.
type Drops struct {
	// Space is its inode; Pod is whose it is, NAMESPACE/NAME, where the agent knows it.
	Space  uint32 `json:"space"`
	Pod    string `json:"pod,omitempty"`
	Reason string `json:"reason"`
	Count  uint64 `json:"count"`
}

// Flow adds up the TCP connections of a client with a port of a server that have ended, as
// one of the two ends has seen them.
type Flow struct {
	Space  uint32 // inode of the network namespace of that end
	Client netip.Addr
	Server netip.AddrPort
	// OfClient says that it is the client's.
	OfClient bool
	// Ended are all; Refused, Unanswered and Reset are those of them that ended so.
	Ended, Refused, Unanswered, Reset uint64
	// Sent are bytes that the other end acknowledged, Received those from it.
	Sent, Received, Retransmits uint64
}

// Value is one setting of the kernel that a layer has set.
type Value struct {
	Name string `json:"name"`
	// Value is what it is now, Before what it was before.
	Value  string `json:"value"`
	Before string `json:"before"`
	// Owner is who asks for it.
	Owner string `json:"owner"`
}

// Program is one eBPF program in force.
type Program struct {
	Name string `json:"name"`
	// Hook is where it is attached: "cgroup/connect4 /sys/fs/cgroup".
	Hook string `json:"hook"`
	// Device is the network device, where it is attached to one.
	Device string `json:"device,omitempty"`
	// Link is the kernel's id of the attachment.
	Link uint32 `json:"link"`
}
