package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/kernel/netns"
)

// patience is how long a worker may take beyond what it was told to: a
// connection that hangs longer than this ends the run.
const patience = 10 * time.Second

// process is a worker, seen from the benchmark.
type process struct {
	what    string // for messages: "client of iptables-nft, 1000 Services"
	command *exec.Cmd
	in      *os.File
	out     *os.File
	lines   *bufio.Reader
	stderr  bytes.Buffer
	// first is what it said when it was ready.
	first outcome
}

// startWorker starts a worker in a namespace and a cgroup and waits until it is
// ready. It is born in both: a socket keeps the cgroup that its process had.
func startWorker(ctx context.Context, what string, worker []string, namespace, group string, args ...string) (*process, error) {
	p := &process{what: what}
	if err := p.start(ctx, worker, namespace, group, args); err != nil {
		return nil, fmt.Errorf("start %s: %w", what, err)
	}
	var err error
	if p.first, err = p.answer(patience); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *process) start(ctx context.Context, worker []string, namespace, group string, args []string) error {
	childIn, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer childIn.Close()
	out, childOut, err := os.Pipe()
	if err != nil {
		in.Close()
		return err
	}
	defer childOut.Close()
	p.in, p.out, p.lines = in, out, bufio.NewReader(out)

	p.command = exec.CommandContext(ctx, worker[0], append(worker[1:len(worker):len(worker)], args...)...)
	p.command.Stdin, p.command.Stdout, p.command.Stderr = childIn, childOut, &p.stderr
	// No preemption by signals, which would interrupt system calls; the second
	// of the two processors is for the goroutine that waits for the end of input.
	p.command.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=2")
	if err := netns.Start(namespace, group, p.command); err != nil {
		in.Close()
		out.Close()
		return err
	}
	return nil
}

// tell sends a command and waits for its outcome.
func (p *process) tell(do command) (outcome, error) {
	line, err := json.Marshal(do)
	if err != nil {
		return outcome{}, fmt.Errorf("tell %s: %w", p.what, err)
	}
	return p.say(line, time.Duration(do.Nanoseconds))
}

// say sends a line and waits for the outcome of what takes so long.
func (p *process) say(line []byte, takes time.Duration) (outcome, error) {
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		return outcome{}, p.died(err)
	}
	return p.answer(takes + patience)
}

func (p *process) answer(within time.Duration) (outcome, error) {
	var result outcome
	if err := p.out.SetReadDeadline(time.Now().Add(within)); err != nil {
		return result, fmt.Errorf("wait for %s: %w", p.what, err)
	}
	line, err := p.lines.ReadBytes('\n')
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return result, fmt.Errorf("wait for %s: no answer within %s: a connection hangs", p.what, within)
	}
	if err != nil {
		return result, p.died(err)
	}
	if err := json.Unmarshal(line, &result); err != nil {
		return result, fmt.Errorf("read answer %q of %s: %w", line, p.what, err)
	}
	return result, nil
}

// died waits for the process that closed its end and says what it said last.
func (p *process) died(cause error) error {
	_ = p.command.Wait() // the state says how it ended
	said := strings.TrimSpace(p.stderr.String())
	if said == "" && p.command.ProcessState != nil {
		said = p.command.ProcessState.String()
	}
	return fmt.Errorf("%s ended: %s: %w", p.what, said, cause)
}

func (p *process) pid() int { return p.command.Process.Pid }

// stop ends the process, now, and may be called again.
func (p *process) stop() {
	_ = p.command.Process.Kill()
	_ = p.command.Wait()
	p.in.Close()
	p.out.Close()
}

func cpuFlag(cpu int) string { return "-cpu=" + strconv.Itoa(cpu) }
