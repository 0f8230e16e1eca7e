package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/doctor/pack"
)

// partPatience is how long one command of a report may take.
const partPatience = time.Minute

func reportCommand(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "report [FILE]",
		Short: "Pack what somebody needs who helps from afar, without secrets",
		Long: `
Writes one archive (tar, gzip): what doctor finds, what is in force in the
kernel, what the agent says, settings and counters of the network. Nothing is
read of environments, logs, files of pods or the API, and what looks like a key,
a token or a password is taken out. Names and addresses of pods, Services and
nodes are in it: look before you send it. FILE must not be there yet; without one
it is millrace-report-NODE-TIME.tar.gz.`,
		Args: cobra.MaximumNArgs(1),
	}, readsOnly, func(ctx context.Context, args []string) error {
		contents, err := writeReport(ctx, &at, append(args, "")[0])
		if err != nil {
			return err
		}
		if s.json() {
			return printJSON(contents)
		}
		t := newTable(os.Stdout, "FILE", "BYTES", "SECRETS REMOVED", "NOT READ")
		for _, f := range contents.Files {
			t.row(f.Name, fmt.Sprint(f.Bytes), fmt.Sprint(f.Removed), firstLine(f.Error))
		}
		return t.print()
	})
	at.flagRun(c)
	at.flagPins(c)
	return c
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// writeReport takes the file away again if it cannot be written whole.
func writeReport(ctx context.Context, at *place, path string) (*pack.Contents, error) {
	kernel, err := kernelRelease()
	if err != nil {
		return nil, err
	}
	c := &pack.Contents{Tool: "millrace report", Version: version, Node: hostname(), Kernel: kernel, Time: time.Now().UTC()}
	if path == "" {
		path = fmt.Sprintf("millrace-report-%s-%s.tar.gz", c.Node, c.Time.Format("20060102T150405Z"))
	}
	parts, err := reportParts(at)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write report: %w", err)
	}
	progress := newProgress()
	err = pack.Write(ctx, file, c, parts, progress)
	progress.done()
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		os.Remove(path)
		return nil, err
	}
	fmt.Fprintln(os.Stderr, "wrote", path)
	return c, nil
}

// reportParts are what this program says itself, each in a process of its own, so that
// what goes wrong in one spoils no other, and files of the kernel.
func reportParts(at *place) ([]pack.Part, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	var parts []pack.Part
	run, pins := []string{"--run", at.run}, []string{"--pins", at.pins}
	for _, own := range []struct {
		words string
		flags []string
	}{
		{"version", nil}, {"status", run}, {"doctor", nil}, {"show services", append(run, pins...)},
		{"show backends", append(run, pins...)}, {"show settings", run}, {"show drops", pins}, {"show flows", nil},
	} {
		name := strings.ReplaceAll(own.words, " ", "-") + ".json"
		args := slices.Concat(strings.Fields(own.words), own.flags, []string{"-o", "json"})
		parts = append(parts, pack.Part{Name: name, From: "millrace " + own.words, Read: func(ctx context.Context) ([]byte, error) {
			return ownWords(ctx, self, args)
		}})
	}
	return append(parts, pack.Settings("/proc/sys"), pack.Files("counters.txt", "/proc/version", "/proc/loadavg", "/proc/meminfo",
		"/proc/stat", "/proc/interrupts", "/proc/softirqs", "/proc/net/softnet_stat", "/proc/net/snmp", "/proc/net/snmp6", "/proc/net/netstat",
		"/proc/net/sockstat", "/proc/net/sockstat6", "/proc/net/dev", "/proc/net/protocols", "/proc/net/stat/nf_conntrack")), nil
}

// ownWords runs this program and keeps what it says, as far as there is room. That it
// found something wrong is no error.
func ownWords(ctx context.Context, self string, words []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, partPatience)
	defer cancel()
	out, said := bounded{most: pack.MostBytes + 1}, bounded{most: 8 << 10}
	c := exec.CommandContext(ctx, self, words...)
	c.Stdout, c.Stderr = &out, &said
	err := c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitFindings {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()))
	}
	return out.Bytes(), err
}
