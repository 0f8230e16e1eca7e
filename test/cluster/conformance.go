package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// unfit are tests that this cluster cannot pass, whoever serves Services: they are
// about network policies or ingress controllers, or need what is not here: the
// Internet, a cloud and its load balancers (each waits for ten minutes and more),
// SSH to nodes, SCTP, iperf, a metric of the kernel.
const unfit = `Netpol|NetworkPolicy|Feature:Ingress|Disruptive|SCTP|sctp|Internet|Networking-|Performance|LoadBalancer\]|GCE|DNS configMap|NFAcct`

// conformance puts end-to-end tests of the Kubernetes project to the cluster that
// is up, from the namespace of the control plane, which is outside the cluster as
// far as Services are concerned. It prints a line for each test, and writes what
// they said to .cache/cluster/report.
func conformance(ctx context.Context, focus, skip string, processes, attempts int) error {
	bin, err := build(ctx, append(clusterTools, testTools...))
	if err != nil {
		return err
	}
	if _, err := kubectl(ctx, bin, "", "get", "--raw", "/readyz"); err != nil {
		return fmt.Errorf("no cluster is up (make cluster-up): %w", err)
	}
	report, err := filepath.Abs(filepath.Join(cacheFolder, "report"))
	if err != nil {
		return err
	}
	temporary := filepath.Join(report, "tmp") // some of their tests leave files
	if err := errors.Join(os.RemoveAll(report), os.MkdirAll(temporary, 0o755)); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(report, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	say("end-to-end tests, %d at once; they talk to %s", processes, log.Name())
	command := inside(control, filepath.Join(bin, "ginkgo"), "--procs="+strconv.Itoa(processes), "--flake-attempts="+strconv.Itoa(attempts), "--no-color",
		"--focus="+focus, "--skip="+skip, filepath.Join(bin, "e2e.test"), "--",
		"--provider=skeleton", "--kubeconfig="+kubeconfig, "--kubectl-path="+filepath.Join(bin, "kubectl"),
		"--disable-log-dump", "--num-nodes="+strconv.Itoa(nodes), "--allowed-not-ready-nodes=0", "--report-dir="+report)
	command.Env = append(os.Environ(), "TMPDIR="+temporary)
	command.Stdout, command.Stderr = log, log
	ran := runUntil(ctx, command)
	return errors.Join(judge(report), tellRetries(log.Name()), ran)
}

// tellRetries says how many tests were tried more than once, which the report does not.
func tellRetries(log string) error {
	text, err := os.ReadFile(log)
	if n := bytes.Count(text, []byte("Attempt #1 Failed")); n > 0 {
		say("%d tests failed at their first attempt: search %s for \"Attempt #1 Failed\"", n, log)
	}
	return err
}

// runUntil ends a command as a person would, by an interrupt: so ginkgo cleans up.
// In a process group of its own it gets none from the terminal, which would be
// the second, at which it stops cleaning up.
func runUntil(ctx context.Context, command *exec.Cmd) error {
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := command.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = command.Process.Signal(os.Interrupt) })()
	if err := command.Wait(); err != nil {
		return fmt.Errorf("end-to-end tests: %w", err)
	}
	return nil
}

// result of one test, as the report in JUnit's format has it.
type result struct {
	Name    string  `xml:"name,attr"`
	Status  string  `xml:"status,attr"` // passed, failed, skipped, timedout, interrupted ...
	Seconds float64 `xml:"time,attr"`
	// Skipped is why the test did not judge: "skipped - need at least 3 zones".
	Skipped string `xml:"-"`
}

// results of the tests that ran, or that said why they cannot. The report also
// lists those that were not asked for, and what goes on before and after all tests.
func results(content []byte) (ran []result, err error) {
	var report struct {
		Cases []struct {
			result
			Skip struct {
				Message string `xml:"message,attr"`
			} `xml:"skipped"`
		} `xml:"testsuite>testcase"`
	}
	if err := xml.Unmarshal(content, &report); err != nil {
		return nil, err
	}
	for _, r := range report.Cases {
		name, test := strings.CutPrefix(r.Name, "[It] ")
		asked := r.Status != "skipped" || strings.HasPrefix(r.Skip.Message, "skipped - ")
		if test && asked && r.Status != "pending" {
			r.Name, r.Skipped = name, r.Skip.Message
			ran = append(ran, r.result)
		}
	}
	return ran, nil
}

// judge prints each test that ran, and how many passed.
func judge(folder string) error {
	name := filepath.Join(folder, "junit_01.xml")
	content, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("the tests wrote no report: %w", err)
	}
	ran, err := results(content)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	passed, skipped, sum := 0, 0, 0.0
	for _, r := range ran {
		fmt.Printf("%-11s %6.1f s  %s\n", r.Status, r.Seconds, r.Name)
		sum += r.Seconds
		switch r.Status {
		case "passed":
			passed++
		case "skipped":
			skipped++
		}
	}
	say("%d of %d tests passed, %d cannot be judged here; one after the other they take %.0f s", passed, len(ran), skipped, sum)
	if passed+skipped < len(ran) || passed == 0 {
		return errors.New("not all tests passed")
	}
	return nil
}
