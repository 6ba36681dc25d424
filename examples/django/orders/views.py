"""Takes orders and lists them."""

from django.db import transaction
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt

from sekuire.contrib.django import submit_on_commit

from .models import Order


@csrf_exempt
def orders(request):
    if request.method == "POST":
        with transaction.atomic():
            order = Order.objects.create(item=request.POST["item"])
            # The worker must find the order: the task goes out when it is committed, and not at all if it is not.
            submit_on_commit("confirm_order", {"order_id": order.pk})
        return JsonResponse({"order_id": order.pk}, status=201)
    return JsonResponse({"orders": list(Order.objects.values("id", "item", "confirmation").order_by("id"))})
