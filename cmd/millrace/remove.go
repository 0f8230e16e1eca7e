package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer"
)

func removeCommand(s *settings) *cobra.Command {
	var at place
	var dryRun bool
	c := command(&cobra.Command{
		Use:   "remove",
		Short: "Take everything of millrace out of this host",
		Long: `
Detaches the programs, removes maps and pins, puts back settings of the kernel
that nobody else has set since, and removes the run folder, so that the host is
as it was found. Connections that are open stay open. It is undone by
starting an agent again. Stop the agent first.`,
	}, changesHost, func(context.Context, []string) error {
		if agent.Running(at.run) {
			return fmt.Errorf("remove: %w", agent.ErrRunning)
		}
		layers := at.pinned()
		removed := []planned{}
		var failures []error
		for i := len(layers) - 1; i >= 0; i-- {
			changes, err := removal(layers[i], dryRun)
			failures = append(failures, err)
			for _, change := range changes {
				removed = append(removed, planned{change.Op, layers[i].Name(), change.Subject.Object(), change.Subject.Detail()})
				if !s.json() {
					fmt.Println(change)
				}
			}
		}
		if !dryRun {
			failures = append(failures, removeRunFolder(at.run))
		}
		if !dryRun && len(removed) > 0 {
			failures = append(failures, removeEmpty(at.pins))
		}
		if s.json() {
			failures = append(failures, printJSON(map[string]any{"changes": removed, "dry_run": dryRun}))
		} else if len(removed) == 0 && errors.Join(failures...) == nil {
			fmt.Fprintln(os.Stderr, "nothing of millrace is here")
		}
		return errors.Join(failures...)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagProcSys(c)
	c.Flags().BoolVar(&dryRun, "dry-run", false, "print what would be removed and remove nothing")
	return c
}

func removal(l layer.Layer, dryRun bool) (layer.Changes, error) {
	if dryRun {
		return l.Removal()
	}
	return l.Remove()
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
