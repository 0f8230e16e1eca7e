package cluster

import (
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/millrace/millrace/model"
)

// workload reads something that makes pods; nil for what another workload made,
// and for kinds that make none.
func (r *reader) workload(obj runtime.Object) *model.Workload {
	switch obj := obj.(type) {
	case *appsv1.Deployment:
		return r.made(obj.Spec.Selector, &obj.Spec.Template, r.replicas("spec.replicas", obj.Spec.Replicas))
	case *appsv1.StatefulSet:
		return r.made(obj.Spec.Selector, &obj.Spec.Template, r.replicas("spec.replicas", obj.Spec.Replicas))
	case *appsv1.ReplicaSet:
		if metav1.GetControllerOf(obj) != nil {
			return nil
		}
		return r.made(obj.Spec.Selector, &obj.Spec.Template, r.replicas("spec.replicas", obj.Spec.Replicas))
	case *appsv1.DaemonSet:
		w := r.made(obj.Spec.Selector, &obj.Spec.Template, 0)
		w.PerNode = true
		return w
	case *batchv1.Job:
		return r.made(nil, &obj.Spec.Template, r.jobPods(obj))
	}
	return nil
}

func (r *reader) made(selector *metav1.LabelSelector, template *corev1.PodTemplateSpec, replicas int) *model.Workload {
	w := &model.Workload{
		Name:     r.object.name,
		Kind:     r.object.kind.String(),
		Replicas: replicas,
		Template: r.podLike("spec.template.", &template.ObjectMeta, &template.Spec),
		Where:    r.object.Where(),
	}
	if selector == nil {
		return w
	}
	switch s, err := metav1.LabelSelectorAsSelector(selector); {
	case err != nil:
		r.advise("spec.selector", "the selector cannot be read: %s", clip(err.Error()))
	case !s.Matches(labels.Set(template.Labels)):
		r.advise("spec.selector", "the selector does not match the labels of the template, so Kubernetes refuses this %s: make them agree", w.Kind)
	}
	return w
}

// replicas is how many pods are wanted, one where nothing is said.
func (r *reader) replicas(field string, n *int32) int {
	switch {
	case n == nil:
		return 1
	case *n < 0:
		r.fault(field, "%d pods cannot be: use 0 or more", *n)
		return 1
	}
	return int(*n)
}

// jobPods is how many pods of a Job run at a time: parallelism, but not more
// than it takes to complete, and none when it is suspended or over.
func (r *reader) jobPods(job *batchv1.Job) int {
	n := r.replicas("spec.parallelism", job.Spec.Parallelism)
	if c := job.Spec.Completions; c != nil {
		n = min(n, r.replicas("spec.completions", c))
	}
	if job.Spec.Suspend != nil && *job.Spec.Suspend {
		return 0
	}
	for _, c := range job.Status.Conditions {
		if (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) && c.Status == corev1.ConditionTrue {
			return 0
		}
	}
	return n
}
