package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// conformance puts end-to-end tests of the Kubernetes project to the cluster that
// is up, from the namespace of the control plane, which is outside the cluster as
// far as Services are concerned. It prints a line for each test, and writes what
// they said to .cache/cluster/report.
func conformance(ctx context.Context, focus, skip string, processes int) error {
	bin, err := build(ctx)
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
	if err := errors.Join(os.RemoveAll(report), os.MkdirAll(report, 0o755)); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(report, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	say("end-to-end tests, %d at once; they talk to %s", processes, log.Name())
	command := inside(control, filepath.Join(bin, "ginkgo"), "--procs="+strconv.Itoa(processes), "--no-color",
		"--focus="+focus, "--skip="+skip, filepath.Join(bin, "e2e.test"), "--",
		"--provider=skeleton", "--kubeconfig="+kubeconfig, "--kubectl-path="+filepath.Join(bin, "kubectl"),
		"--disable-log-dump", "--num-nodes="+strconv.Itoa(nodes), "--allowed-not-ready-nodes=0", "--report-dir="+report)
	command.Stdout, command.Stderr = log, log
	ran := runUntil(ctx, command)
	return errors.Join(judge(report), ran)
}

// runUntil ends a command as a person would, by an interrupt: so ginkgo cleans up.
func runUntil(ctx context.Context, command *exec.Cmd) error {
	if err := command.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = command.Process.Signal(os.Interrupt) })()
	if err := command.Wait(); err != nil {
		return fmt.Errorf("end-to-end tests: %w", err)
	}
	return nil
}

// suite is what is read of a report in JUnit's format.
type suite struct {
	Cases []struct {
		Name    string  `xml:"name,attr"`
		Status  string  `xml:"status,attr"`
		Seconds float64 `xml:"time,attr"`
	} `xml:"testsuite>testcase"`
}

// judge prints each test that ran, and how many passed.
func judge(report string) error {
	files, _ := filepath.Glob(filepath.Join(report, "junit*.xml")) // the pattern is not malformed
	passed, failed, sum := 0, 0, 0.0
	for _, name := range files {
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var all suite
		if err := xml.Unmarshal(content, &all); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		for _, c := range all.Cases {
			if c.Status == "skipped" || c.Status == "pending" || c.Name[0] == '[' && c.Name[1] != 'I' {
				continue // not asked for, or set-up and report
			}
			fmt.Printf("%-11s %6.1f s  %s\n", c.Status, c.Seconds, c.Name)
			sum += c.Seconds
			if c.Status == "passed" {
				passed++
			} else {
				failed++
			}
		}
	}
	say("%d passed, %d did not; one after the other they would take %v", passed, failed, time.Duration(sum)*time.Second)
	if failed > 0 || passed == 0 {
		return errors.New("not all tests passed")
	}
	return nil
}
