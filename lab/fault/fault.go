package fault

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// Fault is one way for packets to die, or, without Causes, a healthy run.
type Fault struct {
	// Name is how people ask for it: "conntrack-full".
	Name string
	// Number is its row in the list of faults that were measured; empty for a variant.
	Number string
	// Says is what it is, in one sentence.
	Says string
	// Causes are the identifiers of which one must be named, and no other.
	Causes []string
	// Seen are outcomes of which its application must have seen one, or it did not take.
	Seen []Outcome

	families family
	// whole says that it meets more than the traffic of its own part.
	whole bool
	// behind says that its server may be behind an address that the router translates.
	behind bool
	// once says that it is not sent again and again: what it meets lasts.
	once bool
	// alone says that no other traffic is beside it, for that would suffer.
	alone bool
	// needs are programs that it is induced by.
	needs []string
	// window is how long it takes to show, where that is longer than others do.
	window time.Duration
	// settings are what its scene is made with.
	shape shape
	// induce breaks the network, or does nothing.
	induce func(*Part) error
	// send is its application; it returns when it has seen enough, or ctx ended.
	send func(context.Context, *Part)
	// took looks for more signs that it took, after the window; it may be nil.
	took func(*Part) error
}

// Control says that nothing is wrong: not one cause may be named.
func (f *Fault) Control() bool { return len(f.Causes) == 0 }

// Missing names the programs that the fault needs and that are not installed.
func (f *Fault) Missing() (names []string) {
	for _, name := range f.needs {
		if _, err := exec.LookPath(name); err != nil {
			names = append(names, name)
		}
	}
	return names
}

// family is which IP a fault can have.
type family int

const (
	both family = iota
	onlyFour
	onlySix
)

// All lists the faults: those that were measured, in the order of their numbers,
// variants of them, and the healthy runs.
func All() []*Fault {
	return slices.Concat(conntrackFaults, mtuFaults, firewallFaults, socketFaults, queueFaults, neighbourFaults, routeFaults,
		checksumFaults, programFaults, vxlanFaults, controls)
}

// Find is the fault of that name, or an error that says which there are.
func Find(name string) (*Fault, error) {
	var names []string
	for _, f := range All() {
		if f.Name == name || f.Number == name && name != "" {
			return f, nil
		}
		names = append(names, f.Name)
	}
	return nil, fmt.Errorf("no fault is called %q: there are %s", name, strings.Join(names, ", "))
}
