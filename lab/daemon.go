package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
	"golang.org/x/sys/unix"
)

// startReport is a line of JSON in which a detached lab tells who started it
// how far it is.
type startReport struct {
	Progress string `json:"progress,omitempty"`
	Up       bool   `json:"up,omitempty"`
	Error    string `json:"error,omitempty"`
	Kind     string `json:"kind,omitempty"`
}

// kinds are the errors that keep their identity across processes.
var kinds = map[string]error{"up": ErrUp, "name": ErrName, "privilege": ErrPrivilege, "range": ErrRange}

// reportFile is the descriptor for startReports: the first after the standard
// three.
const reportFile = 3

// Start runs argv, a command that calls Daemon, detached from this process and
// its terminal. It returns when the lab is up, or with the reason why it could
// not come up. When ctx ends before that, the lab is ended, too. progress may
// be nil.
func Start(ctx context.Context, argv []string, progress func(line string)) error {
	reports, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start lab: %w", err)
	}
	defer reports.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr // until Daemon has a log
	cmd.ExtraFiles = []*os.File{write}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	write.Close()
	if err != nil {
		return fmt.Errorf("start lab: %w", err)
	}
	go cmd.Wait()
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(unix.SIGTERM) })
	defer stop()
	lines := bufio.NewScanner(reports)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r startReport
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("start lab: read its report: %w", err)
		}
		switch {
		case r.Up:
			return nil
		case r.Error != "":
			return &startError{r.Error, kinds[r.Kind]}
		case progress != nil:
			progress(r.Progress)
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("start lab: %w", context.Cause(ctx))
	}
	return errors.New("start lab: its process ended without saying why")
}

// startError is an error of the detached process: its own text, and the
// identity of the error it was there.
type startError struct {
	text string
	kind error
}

func (e *startError) Error() string { return e.text }
func (e *startError) Unwrap() error { return e.kind }

// Daemon is Run for a process that Start started: it reports to Start, and
// once the lab is up it has cut every tie with it. What it prints goes to
// log/lab.log in the lab's folder.
func Daemon(ctx context.Context, cfg Config) error {
	// What this process starts must not hold the descriptor, too: Start tells
	// from its closing that this process died.
	unix.CloseOnExec(reportFile)
	signal.Ignore(unix.SIGHUP)
	r := &reporter{to: os.NewFile(reportFile, "reports")}
	cfg.Progress = func(line string) { r.send(startReport{Progress: line}) }
	cfg.Up = func() {
		r.send(startReport{Up: true})
		r.close()
		detach(cfg)
	}
	err := Run(ctx, cfg)
	if err != nil {
		report := startReport{Error: err.Error()}
		for name, kind := range kinds {
			if errors.Is(err, kind) {
				report.Kind = name
			}
		}
		r.send(report)
	}
	return err
}

// reporter writes reports for as long as anybody reads them.
type reporter struct {
	mu sync.Mutex
	to *os.File
}

func (r *reporter) send(report startReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.to != nil {
		json.NewEncoder(r.to).Encode(report)
	}
}

func (r *reporter) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.to.Close()
	r.to = nil
}

// detach sends the standard outputs to the lab's log. Without a log they stay.
func detach(cfg Config) {
	folder := cfg.Folder
	if folder == "" {
		folder = Folder(cfg.Name)
	}
	log, err := appendLog(paths{folder: folder}.log("lab"))
	if err != nil {
		return
	}
	defer log.Close()
	unix.Dup3(int(log.Fd()), 1, 0)
	unix.Dup3(int(log.Fd()), 2, 0)
}

// execInside moves this process into a cgroup and its thread into a network
// namespace, and replaces it by argv there.
func execInside(namespace, group string, argv []string, env ...string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return fmt.Errorf("run %s: %w", argv[0], err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cgroup.Add(group, 0); err != nil {
		return err
	}
	if err := netns.Enter(namespace); err != nil {
		return err
	}
	err = unix.Exec(path, argv, append(os.Environ(), env...))
	return fmt.Errorf("run %s: %w", path, err)
}
