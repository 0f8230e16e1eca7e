package need

import (
	"runtime"
	"sync"
	"testing"
	"time"
)

// Threads end all the time in a process that enters network namespaces: what is read of one
// thread is read whole.
func TestThreadsThatEnd(t *testing.T) {
	over := make(chan struct{})
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				done := make(chan struct{})
				go func() {
					runtime.LockOSThread() // it ends with its goroutine
					close(done)
				}()
				<-done
			}
		})
	}
	checks := 0
	for begun := time.Now(); time.Since(begun) < time.Second; checks++ {
		if _, err := effective(); err != nil {
			t.Errorf("after %d checks: %v", checks, err)
			break
		}
	}
	close(over)
	others.Wait()
	t.Logf("%d checks", checks)
}
