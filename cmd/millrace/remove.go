package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/service"
)

func removeCommand(s *settings) *cobra.Command {
	var at place
	r := removing{settings: s, Removed: []planned{}}
	c := command(&cobra.Command{
		Use:   "remove",
		Short: "Take everything of millrace out of this host",
		Long: `
Detaches the programs, removes maps and pins, puts back settings of the kernel
that nobody else has set since, and removes the run folder, so that the host is
as it was found. What begins meanwhile is left to whoever serves beside:
start kube-proxy first if Services have to go on. Connections that began at the
socket go on. Those that are translated packet by packet (node ports from outside,
--path packet) have the time of --drain to end; then they are cut.
It is undone by starting an agent again. Stop the agent first.`,
	}, changesHost, func(ctx context.Context, _ []string) error {
		if agent.Running(at.run) {
			return fmt.Errorf("remove: %w", agent.ErrRunning)
		}
		r.layers = at.pinned()
		if err := r.leave(ctx); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
		err := r.remove(&at)
		if s.json() {
			return errors.Join(err, printJSON(&r))
		}
		if len(r.Removed) == 0 && err == nil {
			fmt.Fprintln(os.Stderr, "nothing of millrace is here")
		}
		return err
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagProcSys(c)
	c.Flags().BoolVar(&r.DryRun, "dry-run", false, "print what would be removed and remove nothing")
	c.Flags().DurationVar(&r.drain, "drain", service.DefaultDrain,
		"how long connections that are translated packet by packet may go on; 0 cuts them at once")
	return c
}

// removing is what the command does and says.
type removing struct {
	settings *settings
	layers   []layer.Layer
	drain    time.Duration

	Removed []planned `json:"changes"`
	// Connections are translated packet by packet and end with the layers.
	Connections int  `json:"connections"`
	DryRun      bool `json:"dry_run"`
}

// done says what was done, or would be; of names the layer.
func (r *removing) done(of string, changes layer.Changes) {
	for _, change := range changes {
		r.Removed = append(r.Removed, planned{change.Op, of, change.Subject.Object(), change.Subject.Detail()})
		if !r.settings.json() {
			fmt.Println(change)
		}
	}
}

// leave makes the layers begin nothing new, and gives what is open time to end.
func (r *removing) leave(ctx context.Context) error {
	if r.drain > 0 && !r.DryRun {
		if err := r.wait(ctx); err != nil {
			return err
		}
	}
	if r.drain <= 0 {
		return nil
	}
	if err := r.count(); err != nil || r.Connections == 0 {
		return err
	}
	if r.DryRun {
		fmt.Fprintf(os.Stderr, "%d connections are translated packet by packet; they would have %v to end\n", r.Connections, r.drain)
	} else {
		fmt.Fprintf(os.Stderr, "%d connections have not ended within %v and are cut\n", r.Connections, r.drain)
	}
	return nil
}

// answersWithin is how long answers may take to datagrams that were sent before the
// layers left: these are no connections that anybody could count.
const answersWithin = 2 * time.Second

// wait has the layers leave, and returns when connections have ended, or their time is
// over.
func (r *removing) wait(ctx context.Context) error {
	begun, said := time.Now(), 0
	for r.isThere() {
		if err := errors.Join(r.beginNothing(), r.count()); err != nil {
			return err
		}
		passed := time.Since(begun)
		if passed >= r.drain || r.Connections == 0 && passed >= answersWithin {
			return nil
		}
		if r.Connections != said {
			said = r.Connections
			fmt.Fprintf(os.Stderr, "%d connections go on, for %v at most\n", said, (r.drain - passed).Round(time.Second))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("interrupted: nothing new is served here, %d connections go on: run it again, or start an agent", r.Connections)
		case <-time.After(time.Second):
		}
	}
	return nil
}

// beginNothing is for the layers to say how. What has ended since is forgotten.
func (r *removing) beginNothing() error {
	for _, l := range slices.Backward(r.layers) {
		changes, err := l.Leave()
		r.done(l.Name(), changes)
		if err != nil {
			return err
		}
	}
	return nil
}

// isThere says whether there is anything to remove of a layer.
func (r *removing) isThere() bool {
	return slices.ContainsFunc(r.layers, func(l layer.Layer) bool {
		changes, err := l.Removal()
		return err != nil || len(changes) > 0
	})
}

// count counts the connections that end with the layers.
func (r *removing) count() error {
	r.Connections = 0
	for _, l := range r.layers {
		left, err := l.Left()
		if err != nil {
			return fmt.Errorf("count open connections: %w; --drain 0 does not", err)
		}
		r.Connections += left
	}
	return nil
}

// remove removes the layers, and what belongs to none.
func (r *removing) remove(at *place) error {
	var failures []error
	for _, l := range slices.Backward(r.layers) {
		verb := l.Remove
		if r.DryRun {
			verb = l.Removal
		}
		changes, err := verb()
		failures = append(failures, err)
		r.done(l.Name(), changes)
	}
	failures = append(failures, r.release())
	if r.DryRun {
		return errors.Join(failures...)
	}
	failures = append(failures, removeRunFolder(at.run))
	if len(r.Removed) > 0 {
		failures = append(failures, removeEmpty(at.pins))
	}
	return errors.Join(failures...)
}

// hold is the table that `millrace kube-proxy remove` leaves.
type hold struct{}

func (hold) Object() string { return "table inet " + nft.HoldTable }
func (hold) Detail() string { return "" }

// release removes that table, unless connections need it: a kube-proxy that is back
// keeps them translated by its own rules.
func (r *removing) release() error {
	rules := nft.In("")
	held, err := rules.Held()
	if err != nil || !held {
		return err
	}
	found, err := kubeproxy.Find("")
	if err != nil {
		return fmt.Errorf("find kube-proxy's rules: %w", err)
	}
	if len(found.Parts) == 0 && found.Connections > 0 {
		fmt.Fprintf(os.Stderr, "table inet %s stays, for %d connections are translated: run `millrace kube-proxy remove` when they have ended\n",
			nft.HoldTable, found.Connections)
		return nil
	}
	if !r.DryRun {
		err = rules.Release()
	}
	if err == nil {
		r.done("", layer.Changes{{Op: layer.Remove, Subject: hold{}}})
	}
	return err
}

// removeRunFolder removes the agent's files, and the folder they were in if
// nothing else is there.
func removeRunFolder(folder string) error {
	ours := false
	for _, name := range []string{"agent.sock", "agent.lock", configCopy} {
		err := os.Remove(filepath.Join(folder, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove run folder: %w", err)
		}
		ours = ours || err == nil
	}
	if !ours {
		return nil
	}
	return removeEmpty(folder)
}

// removeEmpty removes a folder if nothing is in it. What is absent or in use by
// somebody else stays as it is.
func removeEmpty(path string) error {
	err := os.Remove(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
